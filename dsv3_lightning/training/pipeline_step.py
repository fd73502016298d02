"""A training step through a pipeline: the weights of its micro-batches' losses, and the losses of the whole."""

from collections.abc import Callable, Sequence

from torch import Tensor

from dsv3_lightning.model.transformer import Losses
from dsv3_lightning.parallel.pipeline.pipeline import Pipeline
from dsv3_lightning.parallel.pipeline.stage import Weights
from dsv3_lightning.training.balance import BalanceTerm


def pipeline_step(
    pipeline: Pipeline, batch: dict[str, Tensor], micro_batches: int, head_loss: Callable[[Tensor, int], Tensor],
    balance: BalanceTerm, data_ranks: int, counts_LE: Tensor | None,
) -> Losses:  # fmt: skip
    """Forward and backward passes of all micro-batches; returns the losses of this rank's batch, without gradients.

    head_loss: from the summed token losses [P] and the number of parts in the step. counts_LE: the step's tokens per
    expert, where balance losses need them. Each loss is the mean over the parts, of which a rank has `micro_batches`.
    """
    parts = micro_batches * data_ranks

    def balance_loss(terms: dict[str, Tensor], rows: Sequence[int]) -> Tensor | float:
        own_LE = None if counts_LE is None else counts_LE[list(rows)]
        return balance.total(terms, own_LE, parts) / micro_batches

    weights = Weights(lambda nll_P: head_loss(nll_P, parts) / micro_batches, balance_loss)
    return pipeline.train(batch, micro_batches, weights)
