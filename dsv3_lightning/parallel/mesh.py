"""Arithmetic of the device mesh: which axis sizes fit a number of processes. Imports no torch.

`pipeline_parallel` (axis `pp`, outermost) divides the ranks into stages, which hold different layers. Within a stage
every rank is a data-parallel rank with different samples. Each of `dp_replicate` groups holds a copy of the stage,
sharded over the `dp_shard` ranks of the group. `expert_parallel` (axis `ep`) divides `dp_shard`: that many neighboring
ranks hold different experts and exchange tokens, and the other factor of `dp_shard` shards each expert.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from dsv3_lightning.common.schedules import SCHEDULES
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.parallel.pipeline.checks import check_settings

Kind = Literal["fsdp2", "hsdp", "fsdp2_ep"]
KINDS: tuple[str, ...] = get_args(Kind)
Overlap = Literal["none", "two_batches", "pairs"]
Size = int | Literal["auto"]
if TYPE_CHECKING:
    ScheduleName = str
else:
    ScheduleName = Literal[(*SCHEDULES,)]


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """The parallelism of a run: how its model is spread over processes. Raises ConfigError.

    kind: `fsdp2` shards parameters, gradients and optimizer state over all ranks (arXiv 1910.02054, stage 3); `hsdp`
        shards within a node and keeps a copy per node; `fsdp2_ep` is fsdp2 with experts that stay where they are
        while tokens travel (V3 §3.2).
    pipeline_parallel: the number of ranks over which the layers are spread (docs/pipelines.md); 1: no pipeline.
    schedule: the order of a pipeline's passes. micro_batches: the parts of a step that go through it one after the
        other; `auto` is twice pipeline_parallel.
    stages: the number of layers in each of the pipeline's chunks; None splits them by planned cost.
    waiting_weights: of schedules that split the backward pass, how many of its weight parts may wait at a time on a
        rank, each with inputs and gradients of its chunk's products; None: as many as the schedule lets wait.
    dp_replicate, dp_shard: sizes of the mesh, outermost first; their product, times pipeline_parallel, is the number of
        processes.
    expert_parallel: ranks over which a layer's experts are spread, with any `kind`. `auto` is 1 for fsdp2 and hsdp,
        and for fsdp2_ep as many ranks of a node as divide the experts.
    node_size: ranks per node; `auto`: as many as were started on one machine.
    deduplicate: where an ep group spans several nodes, a token travels once to each node that has some of its experts,
        and from there to these. false: once to each of its experts. Only with the default dispatcher.
    reshard_after_forward: frees a block's gathered parameters after its forward pass and gathers them again for the
        backward pass: less memory, 50 % more communication.
    cpu_offload: parameters, gradients and optimizer state live in the host's memory (GPUs only).
    prefetch: the number of blocks whose parameters are gathered ahead of the one that computes.
    sharded_checkpoints: each rank writes its shards in the background, so no rank ever gathers the model and training
        waits only for a copy in memory; otherwise the first rank writes one file. Both can be resumed on any mesh.
    overlap: what is computed while tokens travel to their experts and back. `two_batches`: each MoE layer takes a
        micro-batch in two halves of its sequences, one of which computes while the other's tokens travel. `pairs`:
        where the pipeline schedule dualpipev pairs a forward with a backward pass, these take turns.
    dispatcher: the class that sends tokens to the ranks of their experts and back, with the methods of
        `model.dispatch.Dispatcher`; called with the process group of these ranks and the number of experts.
    timeout_minutes: how long a collective waits for a rank before all ranks stop.
    step_timeout_minutes: the same from the second step of a start on, when everything is connected and warm; None:
        no change. It must be longer than the first rank takes for a checkpoint of one file, or for its part of one.
    """

    kind: Kind
    pipeline_parallel: int = 1
    schedule: ScheduleName = "zbv"
    micro_batches: Size = "auto"
    stages: list[int] | None = None
    waiting_weights: int | None = None
    dp_replicate: Size = "auto"
    dp_shard: Size = "auto"
    expert_parallel: Size = "auto"
    node_size: Size = "auto"
    deduplicate: bool = True
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    prefetch: int = 1
    sharded_checkpoints: bool = False
    overlap: Overlap = "none"
    dispatcher: str = "dsv3_lightning.parallel.dispatch.AllToAll"
    timeout_minutes: float = 30.0
    step_timeout_minutes: float | None = None

    def __post_init__(self) -> None:
        for name in ("dp_replicate", "dp_shard", "expert_parallel", "node_size"):
            value = getattr(self, name)
            if value != "auto" and value < 1:
                raise ConfigError(f"strategy.{name}={value}: must be at least 1, or auto")
        check_settings(self)
        if self.prefetch < 0:
            raise ConfigError(f"strategy.prefetch={self.prefetch}: must be at least 0")
        if not self.timeout_minutes > 0:
            raise ConfigError(f"strategy.timeout_minutes={self.timeout_minutes}: must be above 0")
        if (later := self.step_timeout_minutes) is not None and not 0 < later <= self.timeout_minutes:
            raise ConfigError(
                f"strategy.step_timeout_minutes={later}: must be above 0 and at most "
                f"strategy.timeout_minutes={self.timeout_minutes}, or null"
            )


@dataclass(frozen=True)
class MeshShape:
    """The size of each mesh axis; ep divides dp_shard.

    pp: the number of stages, outermost; the others are within a stage.
    small_shard: the number of neighboring ranks over which norms and routers are sharded; it divides dp_shard. None is
    dp_shard. nodes: those of an ep group to each of which a token travels once; 1: tokens travel to experts directly.
    """

    dp_replicate: int
    dp_shard: int
    ep: int = 1
    small_shard: int | None = None
    nodes: int = 1
    pp: int = 1

    @property
    def ranks(self) -> int:
        return self.pp * self.data_ranks

    @property
    def data_ranks(self) -> int:
        """The number of ranks with different samples: those of a stage."""
        return self.dp_replicate * self.dp_shard

    @property
    def expert_shard(self) -> int:
        """The number of ranks over which one expert is sharded."""
        return self.dp_shard // self.ep

    def __str__(self) -> str:
        nodes = f" over {self.nodes} nodes" if self.nodes > 1 else ""
        experts = f" (experts: {self.expert_shard} x ep {self.ep}{nodes})" if self.ep > 1 else ""
        stages = f"pp {self.pp} x " if self.pp > 1 else ""
        return f"{stages}dp_replicate {self.dp_replicate} x dp_shard {self.dp_shard}{experts}"


def mesh_shape(config: StrategyConfig, ranks: int, ranks_per_node: int, model: ModelConfig | None = None) -> MeshShape:
    """The mesh for `ranks` processes, with `auto` resolved. Raises ConfigError that names the nearest valid sizes.

    ranks_per_node: the processes that were started on each machine; used where `node_size` is `auto`.
    """
    wanted, shard = config.dp_replicate, config.dp_shard
    if config.node_size != "auto":
        ranks_per_node = config.node_size
        if ranks % ranks_per_node:
            raise ConfigError(
                f"strategy.node_size={ranks_per_node}: does not divide {ranks} processes; "
                f"use {near(ranks_per_node, ranks)}"
            )
    stages = config.pipeline_parallel
    if ranks % stages:
        raise ConfigError(
            f"strategy.pipeline_parallel={stages}: does not divide {ranks} processes; use {near(stages, ranks)}"
        )
    ranks //= stages
    processes = f"{ranks} processes" if stages == 1 else f"the {ranks} processes of a stage"
    if wanted != "auto":
        replicate = wanted
    elif shard != "auto":
        replicate = max(1, ranks // shard)
    else:
        replicate = ranks // math.gcd(ranks, ranks_per_node) if config.kind == "hsdp" else 1
    if wanted != "auto" and ranks % replicate:
        raise ConfigError(
            f"strategy.dp_replicate={replicate}: does not divide {processes}; use {near(replicate, ranks)}"
        )
    if shard == "auto":
        shard = ranks // replicate
    if replicate * shard != ranks:
        fitting = f"use {near(shard, ranks)}" if wanted == "auto" else f"use {ranks // replicate} or auto"
        raise ConfigError(
            f"strategy.dp_shard={shard}: with dp_replicate={replicate} it makes {replicate * shard} processes, "
            f"there are {ranks}{' in a stage' if stages > 1 else ''}; {fitting}"
        )
    # FSDP2 pads the first dim of each parameter to the number of ranks: on 2,048 ranks V3's routers, of 256 rows, would
    # be gathered eight times as wide. Within a node nothing is padded, and nothing crosses the network.
    node = math.gcd(shard, ranks_per_node)
    ep = expert_size(config, shard, ranks_per_node, model)
    nodes = nodes_of_group(config, ep, ranks_per_node)
    shape = MeshShape(replicate, shard, ep, node if node < shard else None, nodes, stages)
    if model is not None and shape.ep > 1:
        check_expert_widths(shape, model)
    if model is not None and shape.ep == 1 and config.overlap != "none":
        raise ConfigError(
            f"strategy.overlap={config.overlap}: tokens travel only where experts are spread over ranks, and "
            "expert_parallel is 1; use a larger one, or overlap: none"
        )
    return shape


def expert_size(config: StrategyConfig, shard: int, ranks_per_node: int, model: ModelConfig | None) -> int:
    """The size of the ep axis. Raises ConfigError if it doesn't divide dp_shard and the number of experts."""
    experts = model.n_routed_experts if model is not None and model.num_moe_layers else 0
    ep = config.expert_parallel
    if ep == "auto":
        return math.gcd(shard, ranks_per_node, experts) if config.kind == "fsdp2_ep" and experts else 1
    if ep == 1:
        return 1
    if not experts:
        raise ConfigError(f"strategy.expert_parallel={ep}: the model has no experts; use 1 or auto")
    if shard % ep or experts % ep:
        raise ConfigError(
            f"strategy.expert_parallel={ep}: must divide dp_shard={shard} and model.n_routed_experts={experts}; "
            f"use {near(ep, math.gcd(shard, experts))}"
        )
    return ep


def nodes_of_group(config: StrategyConfig, ep: int, ranks_per_node: int) -> int:
    """The nodes to each of which a token travels once, of the nodes that an ep group spans. Raises ConfigError."""
    if not config.deduplicate or ep <= ranks_per_node:
        return 1
    if ep % ranks_per_node == 0:
        return ep // ranks_per_node
    if config.node_size == "auto":  # groups that end within a node, whose ranks have no places in common
        return 1
    raise ConfigError(
        f"strategy.node_size={ranks_per_node}: must divide expert_parallel={ep}, so that an ep group fills its nodes; "
        f"use {near(ranks_per_node, ep)}, or deduplicate: false"
    )


def check_expert_widths(shape: MeshShape, model: ModelConfig) -> None:
    """Raises ConfigError unless the ranks that shard an expert divide one of its widths."""
    share, widths = shape.expert_shard, (model.hidden_size, model.moe_intermediate_size)
    if all(width % share for width in widths):
        raise ConfigError(
            f"strategy.expert_parallel={shape.ep}: leaves {share} ranks per expert, which divide neither "
            f"model.hidden_size={widths[0]} nor moe_intermediate_size={widths[1]}; use another expert_parallel"
        )


def near(value: int, number: int) -> str:
    """The divisors of `number` that are nearest to `value`, in words."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = [d for d in divisors if d < value][-1:]
    above = [d for d in divisors if d > value][:1]
    return " or ".join(map(str, below + above))
