"""The balance term of the loss: Σ α · loss, independent of how a step is split into micro-batches and ranks."""

import torch
from torch import Tensor

from dsv3_lightning.model.balance import batch_loss
from dsv3_lightning.model.balance_table import BALANCE_LOSSES
from dsv3_lightning.model.transformer import Losses, Transformer


class BalanceTerm:
    """The weighted balance losses of each micro-batch; their mean over micro-batches and ranks is the loss of the step.

    factors: α by name. experts_per_token: K. scale: a common factor on α, which a callback may change.

    Losses over the global batch need the token counts of the whole step before the first backward pass. With one
    micro-batch per step its forward pass gives them (one all-reduce for all layers). With several, `count_step` first
    runs the forward passes of the step without gradients: the exact global loss, for a third more compute. A pipeline
    does the same with its micro-batches.
    """

    def __init__(self, factors: dict[str, float], experts_per_token: int) -> None:
        self.factors, self.experts_per_token = factors, experts_per_token
        self.scale = 1.0
        self.step_counts_LE: Tensor | None = None  # of the whole step, if it has several micro-batches
        self.clear()

    @property
    def needs_counts(self) -> bool:
        return any(BALANCE_LOSSES[name].whole_batch for name in self.factors)

    @property
    def names(self) -> list[str]:
        """The logged tags: the term as it is added to the loss, and each loss per layer without α."""
        return ["loss/balance", *(f"loss/balance_{name}" for name in self.factors)] if self.factors else []

    def clear(self) -> None:
        """Resets the sums for the log."""
        self.sums: dict[str, Tensor | float] = dict.fromkeys(self.names, 0.0)
        self.steps = 0.0

    def total(self, terms: dict[str, Tensor], counts_LE: Tensor | None, parts: int) -> Tensor | float:
        """Σ α · Σ_layers loss, 0.0 without experts. terms: `Losses.balance`. counts_LE: the step's, of the same layers.

        parts: micro-batches · ranks, for the later mean.
        """
        return self.weighted(self.completed(terms, counts_LE, parts))

    def weighted(self, completed: dict[str, Tensor]) -> Tensor | float:
        """Σ α · Σ_layers loss of the losses of each layer by name."""
        return sum((self.scale * self.factors[name] * term.sum() for name, term in completed.items()), 0.0)

    def completed(self, terms: dict[str, Tensor], counts_LE: Tensor | None, parts: int) -> dict[str, Tensor]:
        """The loss of each layer by name, those of the whole batch with their frequencies."""
        found = {}
        for name in (name for name in self.factors if name in terms):  # a model without experts has none
            found[name] = terms[name]
            if BALANCE_LOSSES[name].whole_batch:
                assert counts_LE is not None, "the caller counts where `needs_counts` says so"
                found[name] = batch_loss(terms[name], counts_LE, self.experts_per_token) * parts
        return found

    def weigh(self, losses: Losses, counts_LE: Tensor | None, parts: int) -> Tensor | float:
        """As `total`, of all layers, noted for the log."""
        completed = self.completed(losses.balance, counts_LE, parts)
        total = self.weighted(completed)
        for name, term in completed.items():
            self.sums[f"loss/balance_{name}"] += term.detach().mean() / parts
        if self.factors:
            self.sums["loss/balance"] += torch.as_tensor(total).detach() / parts
        self.steps += 1 / parts  # each step has the same weight, also after a resume with different parts
        return total

    def packed(self) -> Tensor:
        """This rank's sums of `names` since `clear`, and its share of the number of steps: fp64."""
        return torch.stack([torch.as_tensor(value).double().cpu() for value in (*self.sums.values(), self.steps)])

    def unpack(self, packed: list[float]) -> None:
        """Restores the sums from such a list."""
        *sums, self.steps = packed
        self.sums = dict(zip(self.names, sums, strict=True))


@torch.no_grad()
def count_step(
    model: Transformer, tokens_BS: Tensor, mask_BS: Tensor, documents_BS: Tensor | None, micro_batch_size: int
) -> Tensor:
    """Tokens per expert [L, E] of a step's micro-batches on this rank, from forward passes without gradients."""
    counts = []
    for first in range(0, len(tokens_BS), micro_batch_size):
        part = slice(first, first + micro_batch_size)
        documents = None if documents_BS is None else documents_BS[part]
        counts.append(model.losses(tokens_BS[part], mask_BS[part], None, documents_BS=documents).counts_LE)
    counts_LE = torch.stack(counts).sum(0)
    torch.clear_autocast_cache()  # the cache holds weights that were cast without gradients
    return counts_LE
