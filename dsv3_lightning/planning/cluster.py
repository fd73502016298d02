"""Estimate of a run on a mesh: memory per rank, network traffic and time per step. Uses no torch and no device.

Memory is exact for weights, gradients and optimizer state, and an estimate for the rest. Times are FLOP over an assumed
share of the peak, plus bytes over bandwidth for communication that doesn't overlap. They leave out latencies,
stragglers, data loading and uneven expert loads.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.planning.activations import activations
from dsv3_lightning.planning.flops import training_flop_per_token
from dsv3_lightning.planning.hardware import GPU
from dsv3_lightning.planning.memory import training_memory
from dsv3_lightning.planning.parameters import attention_weights, count_parameters, moe_parts, swiglu

RECOMPUTED = {"none": 1.0, "selective": 1.0, "full": 4 / 3}  # FLOP factor; `selective` keeps matrix products
MAX_LOGITS = 2**27  # logits computed at a time, as in model/cpu.py for GPUs


class Mesh(Protocol):
    """The size of each mesh axis; see `parallel.mesh.MeshShape`."""

    @property
    def dp_replicate(self) -> int: ...
    @property
    def dp_shard(self) -> int: ...
    @property
    def ep(self) -> int: ...
    @property
    def expert_shard(self) -> int: ...
    @property
    def ranks(self) -> int: ...


class Policy(Protocol):
    """Settings of gathering and offloading; see `parallel.mesh.StrategyConfig`."""

    @property
    def reshard_after_forward(self) -> bool: ...
    @property
    def prefetch(self) -> int: ...
    @property
    def cpu_offload(self) -> bool: ...


@dataclass(frozen=True)
class Work:
    """The work of an optimizer step. tokens: per micro-batch and rank. micro_batches: per rank and step."""

    tokens: int
    micro_batches: int
    sequence_length: int
    precision: str
    policy: str


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


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank receives per step, and the seconds this takes, for parameters and gradients and for tokens.

    host: with offloading, parameters from the host's memory and gradients to it.
    """

    parameters: float
    replicas: float
    tokens: float
    host: float
    parameter_seconds: float
    token_seconds: float
    host_seconds: float


@dataclass(frozen=True)
class StepTime:
    """Seconds per step. Parameter traffic overlaps with compute; token traffic doesn't.

    With offloading AdamW runs on the host; its time is not included.
    """

    compute: float
    traffic: Traffic
    flop: float  # of one rank's step, without recomputation

    @property
    def seconds(self) -> float:
        wires = self.traffic
        return max(self.compute, wires.parameter_seconds, wires.host_seconds) + wires.token_seconds


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


def parameter_split(model: ModelConfig) -> tuple[int, int]:
    """Numbers of parameters: all but routed experts, and routed experts."""
    parameters = count_parameters(model)
    routed = sum(part["routed experts"].total for part in (parameters.main, parameters.mtp) if "routed experts" in part)
    return parameters.total - routed, routed


def last_block(model: ModelConfig, ep: int) -> int:
    """The number of parameters gathered on a rank while the last block, perhaps an MTP module's, computes."""
    if not model.num_moe_layers and not model.mtp_depth:
        return attention_weights(model) + swiglu(model.hidden_size, model.intermediate_size)
    parts = moe_parts(model)
    return attention_weights(model) + parts["routed experts"].total // ep + parts["shared experts"].total


def rank_memory(model: ModelConfig, shape: Mesh, strategy: Policy, work: Work) -> RankMemory:
    """The memory of a rank at the peak, the maximum of three moments: the loss, with its logits and per head an
    fp32 gradient of the output matrix; the scaling of this gradient; and the last block's backward pass, during the
    gradient's reduction.
    """
    whole = training_memory(model, work.tokens, work.precision, work.policy, sharded=True)
    computed = bytes_computed(work)
    per_token, head = activations(model, work.precision, work.policy), model.vocab_size * model.hidden_size
    block = computed * last_block(model, shape.ep)
    if strategy.reshard_after_forward:
        ahead: float = strategy.prefetch * block
    else:
        dense, routed = parameter_split(model)
        ahead = computed * (dense + routed / shape.ep)
    logits = min(work.tokens, MAX_LOGITS // model.vocab_size) * model.vocab_size
    moments = [
        (ahead + 2 * computed * head + (1 + model.mtp_depth) * 4 * head + (computed + 4) * logits,
         work.tokens * per_token.kept),
        (ahead + computed * head + (2 + model.mtp_depth) * 4 * head, work.tokens * per_token.kept),
        (ahead + 2 * block + 4 * head, work.tokens * (per_token.kept + per_token.made_again)),
    ]  # fmt: skip
    gathered, held = max(moments, key=sum)
    return RankMemory(
        weights=whole.weights / shape.dp_shard,
        gradients=whole.gradients / shape.dp_shard,
        optimizer=whole.optimizer / shape.dp_shard,
        gathered=gathered,
        activations=held,
        offloaded=strategy.cpu_offload,
    )


def bytes_computed(work: Work) -> int:
    """Bytes of a number in matrix products."""
    return 4 if work.precision == "32" else 2


def traffic(model: ModelConfig, shape: Mesh, strategy: Policy, work: Work, gpu: GPU) -> Traffic:
    """Bytes and seconds of ring collectives, (n - 1)/n of the whole per rank, and of all-to-alls of routed tokens."""
    dense, routed = parameter_split(model)
    computed = bytes_computed(work)
    per_pass = computed * (2 if strategy.reshard_after_forward else 1) + 4  # gathers, and fp32 gradients
    n, m, r = shape.dp_shard, shape.expert_shard, shape.dp_replicate
    dense_bytes = work.micro_batches * per_pass * dense * (n - 1) / n
    expert_bytes = work.micro_batches * per_pass * routed / shape.ep * (m - 1) / m
    replicas = work.micro_batches * 2 * (r - 1) / r * 4 * (dense + routed) / n
    ways = 5 if work.policy == "full" else 4  # dispatch, combine and their gradients; the first twice if recomputed
    routed_tokens = work.tokens * model.num_experts_per_tok * model.num_moe_layers * work.micro_batches
    token_bytes = ways * routed_tokens * model.hidden_size * computed
    away = (shape.ep - 1) / shape.ep
    outside = max(0.0, 1 - gpu.per_node / shape.ep) if shape.ep > gpu.per_node else 0.0
    seconds = dense_bytes / speed(n, gpu) + expert_bytes / speed(n if m > 1 else 1, gpu)
    seconds += replicas / (gpu.between if shape.ranks > gpu.per_node else gpu.inside)
    token_seconds = token_bytes * ((away - outside) / gpu.inside + outside / gpu.between)
    host = 0.0
    if strategy.cpu_offload:
        passes = 2 if strategy.reshard_after_forward else 1
        host = work.micro_batches * 4 * (passes + 1) * (dense + routed) / n
    return Traffic(
        dense_bytes + expert_bytes, replicas, token_bytes * away, host, seconds, token_seconds, host / gpu.host
    )


def speed(ranks: int, gpu: GPU) -> float:
    """Bandwidth of a ring in bytes/s per rank: that of the slowest link."""
    return gpu.inside if ranks <= gpu.per_node else gpu.between


def step_time(model: ModelConfig, shape: Mesh, strategy: Policy, work: Work, gpu: GPU, efficiency: float) -> StepTime:
    flop = training_flop_per_token(model, work.sequence_length) * work.tokens * work.micro_batches
    compute = RECOMPUTED[work.policy] * flop / (gpu.peak_in(work.precision) * efficiency)
    return StepTime(compute, traffic(model, shape, strategy, work, gpu), flop)
