"""Memory of a rank of a mesh, and batches that divide. Uses no torch and no device; the time of a step is in step.py.

Memory is exact for weights, gradients and optimizer state, and an estimate for the rest.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.planning.activations import activations
from dsv3_lightning.planning.layout import Mesh, Policy, Work
from dsv3_lightning.planning.memory import training_memory
from dsv3_lightning.planning.parameters import attention_weights, moe_parts, parameter_split, swiglu
from dsv3_lightning.planning.share import small_parameters, whole_share

MAX_LOGITS = 2**27  # logits in fp32 at a time, and tokens of a product with the head, as in model/cpu.py for GPUs
LOSS_PRODUCT = 4096


@dataclass(frozen=True)
class RankMemory:
    """Memory of one rank, in bytes. gathered: parameters gathered at the peak, and gradients of the output matrix.

    offloaded: weights, gradients and optimizer state are in the host's memory.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    offloaded: bool

    @property
    def kept(self) -> float:
        """Bytes between steps, on the GPU or the host."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """Bytes on the GPU at the peak."""
        return (0.0 if self.offloaded else self.kept) + self.gathered + self.activations


class Batch(NamedTuple):
    """The batch settings: samples per step, micro-batches per step and rank, and a ramp's start and increment."""

    size: int
    accumulate: int
    ramp: tuple[int, int] | None


def fitting_batch(batch: Batch, known: int, ranks: int) -> Batch:
    """The nearest batch that passes all checks: equal micro-batches on `ranks` ranks and on the `known` ranks of the
    config, also during a ramp."""
    step = ranks // math.gcd(ranks, known)
    accumulate = nearest(batch.accumulate, step)
    parts = accumulate * known
    if batch.ramp is None:
        return Batch(nearest(batch.size, parts), accumulate, None)
    increment = nearest(batch.ramp[1], parts)
    start = nearest(batch.ramp[0], parts)
    return Batch(start + nearest(batch.size - start, increment), accumulate, (start, increment))


def nearest(value: int, unit: int) -> int:
    """The nearest multiple of the unit, at least the unit itself."""
    return max(1, (2 * value + unit) // (2 * unit)) * unit


def last_block(model: ModelConfig, ep: int) -> int:
    """The number of parameters gathered on a rank while the last block, perhaps an MTP module's, computes."""
    if not model.num_moe_layers and not model.mtp_depth:
        return attention_weights(model) + swiglu(model.hidden_size, model.intermediate_size)
    parts = moe_parts(model)
    return attention_weights(model) + parts["routed experts"].total // ep + parts["shared experts"].total


def kept_more(mesh: Mesh, small: int) -> float:
    """Bytes of fp32 shards that a rank keeps since these small parameters are sharded over fewer ranks than others."""
    return (1 / (mesh.small_shard or mesh.dp_shard) - 1 / mesh.dp_shard) * 4 * small


def logits_bytes(model: ModelConfig, work: Work) -> float:
    """Bytes of the logits that the fused loss holds at a time: of a product, and in fp32 of a softmax."""
    softmax = MAX_LOGITS // model.vocab_size
    product = min(work.tokens, max(softmax, LOSS_PRODUCT))
    return (work.computed * product + 4 * min(work.tokens, softmax)) * model.vocab_size


def rank_memory(model: ModelConfig, shape: Mesh, strategy: Policy, work: Work) -> RankMemory:
    """The memory of a rank at the peak, the maximum of three moments: the loss, with its logits and per head an
    fp32 gradient of the output matrix; the scaling of this gradient; and the last block's backward pass, during the
    gradient's reduction.
    """
    whole = training_memory(model, work.tokens, work.precision, work.policy, sharded=True, kind=work.kind)
    small = small_parameters(model, whole_share(model))
    more = kept_more(shape, small)
    computed = work.computed
    of_batch = activations(model, work.tokens, work.precision, work.policy, shape.ep, work.fp8)
    kept, head = of_batch.kept, model.vocab_size * model.hidden_size
    block = computed * last_block(model, shape.ep)
    if strategy.reshard_after_forward:
        ahead: float = strategy.prefetch * block
    else:
        dense, routed = parameter_split(model)
        ahead = computed * (dense + routed / shape.ep)
    logits = logits_bytes(model, work)
    moments = [
        (ahead + 2 * computed * head + (1 + model.mtp_depth) * 4 * head + logits, kept),
        (ahead + computed * head + (2 + model.mtp_depth) * 4 * head, kept),
        (ahead + 2 * block + 4 * head, kept + of_batch.made_again),
    ]
    gathered, held = max(moments, key=sum)
    return RankMemory(
        weights=whole.weights / shape.dp_shard + more,
        gradients=whole.gradients / shape.dp_shard + more,
        optimizer=(whole.optimizer / shape.dp_shard + 2 * more) * work.moment / 4,
        gathered=gathered + 4 * small,
        activations=held,
        offloaded=strategy.cpu_offload,
    )
