"""A run on a mesh as arithmetic: bytes per rank, bytes on the wires, seconds per step. No torch, no device.

Memory is exact for weights, gradients and optimizer state, an estimate for the rest. Times are bytes over bandwidth and
FLOP over an assumed share of the peak: what is not overlapped is added. Latencies, stragglers, the loading of data and
uneven loads of experts are not in them.
"""

from dataclasses import dataclass
from typing import Protocol

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.planning.flops import training_flop_per_token
from dsv3_lightning.planning.hardware import GPU
from dsv3_lightning.planning.memory import training_memory
from dsv3_lightning.planning.parameters import attention_weights, count_parameters, moe_parts, swiglu


class Mesh(Protocol):
    """Sizes by axis, as `parallel.mesh.MeshShape` has them."""

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
    """When parameters are gathered, as `parallel.mesh.StrategyConfig` has it."""

    @property
    def reshard_after_forward(self) -> bool: ...
    @property
    def prefetch(self) -> int: ...


@dataclass(frozen=True)
class Work:
    """One optimizer step. tokens: of a micro-batch on one rank; micro_batches: per rank and step."""

    tokens: int
    micro_batches: int
    sequence_length: int
    precision: str
    policy: str


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank. gathered: parameters of the blocks that are whole for a moment, and their gradients."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank receives per step, and their seconds: of parameters and gradients, and of tokens."""

    parameters: float
    replicas: float
    tokens: float
    parameter_seconds: float
    token_seconds: float


@dataclass(frozen=True)
class StepTime:
    """Seconds per step. tokens_seconds is not overlapped, parameters' traffic is, with computing."""

    compute: float
    traffic: Traffic
    flop: float  # of one rank's step, without recomputation

    @property
    def seconds(self) -> float:
        return max(self.compute, self.traffic.parameter_seconds) + self.traffic.token_seconds


def split_step(batch_size: int, samples: int, ranks: int) -> int:
    """Micro-batches per rank and step. Raises ConfigError where ranks don't divide the step, with the nearest batch."""
    parts = samples * ranks
    if batch_size % parts:
        below, above = batch_size // parts * parts, (batch_size // parts + 1) * parts
        raise ConfigError(
            f"data.batch_size={batch_size}: does not divide into micro-batches of {samples} samples on {ranks} ranks; "
            f"use {f'{below} or ' if below else ''}{above}"
        )
    return batch_size // parts


def parameter_split(model: ModelConfig) -> tuple[int, int]:
    """All parameters but routed experts, and routed experts."""
    parameters = count_parameters(model)
    routed = sum(part["routed experts"].total for part in (parameters.main, parameters.mtp) if "routed experts" in part)
    return parameters.total - routed, routed


def largest_block(model: ModelConfig, ep: int) -> int:
    """Parameters that are whole on a rank while the largest layer computes."""
    dense = swiglu(model.hidden_size, model.intermediate_size) if model.first_k_dense_replace else 0
    moe = 0
    if model.num_moe_layers:
        parts = moe_parts(model)
        moe = parts["routed experts"].total // ep + parts["shared experts"].total
    return attention_weights(model) + max(dense, moe)


def rank_memory(model: ModelConfig, shape: Mesh, strategy: Policy, work: Work) -> RankMemory:
    whole = training_memory(model, work.tokens, work.precision, work.policy)
    computed = 4 if work.precision == "32" else 2
    block, ends = largest_block(model, shape.ep), 2 * model.vocab_size * model.hidden_size
    ahead = 1 + strategy.prefetch
    if not strategy.reshard_after_forward:
        dense, routed = parameter_split(model)
        gathered = computed * (dense + routed / shape.ep)
    else:
        gathered = computed * ahead * block + (4 + computed) * ends / 2  # embedding in fp32, the head stays
    gathered += (computed + 4) * block  # its gradients, and their fp32 copies on the way to be added up
    return RankMemory(
        weights=whole.weights / shape.dp_shard,
        gradients=whole.gradients / shape.dp_shard,
        optimizer=whole.optimizer / shape.dp_shard,
        gathered=gathered if shape.dp_shard > 1 else 0.0,
        activations=whole.activations,
    )


def traffic(model: ModelConfig, shape: Mesh, strategy: Policy, work: Work, gpu: GPU) -> Traffic:
    """Gathers and scatters by ring: (n - 1)/n of the whole per rank; all-to-alls of K slots per token and layer."""
    dense, routed = parameter_split(model)
    computed = 4 if work.precision == "32" else 2
    per_pass = computed * (2 if strategy.reshard_after_forward else 1) + 4  # gathered, and gradients in fp32
    n, m, r = shape.dp_shard, shape.expert_shard, shape.dp_replicate
    dense_bytes = work.micro_batches * per_pass * dense * (n - 1) / n
    expert_bytes = work.micro_batches * per_pass * routed / shape.ep * (m - 1) / m
    replicas = work.micro_batches * 2 * (r - 1) / r * 4 * (dense + routed) / n
    ways = 4 if work.policy == "none" else 6  # there and back, and their gradients; the first two again if recomputed
    slots = work.tokens * model.num_experts_per_tok * model.num_moe_layers * work.micro_batches
    slots_bytes = ways * slots * model.hidden_size * computed
    away = (shape.ep - 1) / shape.ep
    outside = max(0.0, 1 - gpu.per_node / shape.ep) if shape.ep > gpu.per_node else 0.0
    seconds = dense_bytes / speed(n, gpu) + expert_bytes / speed(n if m > 1 else 1, gpu)
    seconds += replicas / (gpu.between if shape.ranks > gpu.per_node else gpu.inside)
    token_seconds = slots_bytes * ((away - outside) / gpu.inside + outside / gpu.between)
    return Traffic(dense_bytes + expert_bytes, replicas, slots_bytes * away, seconds, token_seconds)


def speed(ranks: int, gpu: GPU) -> float:
    """Bytes/s into a rank of a ring: the slowest link's."""
    return gpu.inside if ranks <= gpu.per_node else gpu.between


def step_time(model: ModelConfig, shape: Mesh, strategy: Policy, work: Work, gpu: GPU, efficiency: float) -> StepTime:
    flop = training_flop_per_token(model, work.sequence_length) * work.tokens * work.micro_batches
    recomputed = 4 / 3 if work.policy == "full" else 1.0
    peak = gpu.peak / 2 if work.precision == "32" else gpu.peak  # tf32
    return StepTime(recomputed * flop / (peak * efficiency), traffic(model, shape, strategy, work, gpu), flop)
