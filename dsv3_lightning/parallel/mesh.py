"""The mesh as arithmetic: which sizes fit how many processes. Imports no torch, so a laptop can judge 2,048 ranks.

Every rank is a data-parallel rank: it has samples of its own. `dp_replicate` groups hold a copy of the model each,
sharded over the `dp_shard` ranks of the group.
"""

import math
from dataclasses import dataclass
from typing import Literal

from dsv3_lightning.errors import ConfigError

KINDS = ("fsdp2", "hsdp")
Size = int | Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """How a model is spread over processes. Raises ConfigError.

    kind: `fsdp2` shards parameters, gradients and optimizer state over all ranks (arXiv 1910.02054, stage 3); `hsdp`
        shards within a node and keeps a copy per node.
    dp_replicate, dp_shard: sizes of the mesh, outermost first; their product is the number of processes.
    reshard_after_forward: frees a block's gathered parameters after its forward pass and gathers them again for the
        backward pass: less memory, half as much communication again.
    cpu_offload: parameters, gradients and optimizer state live in the host's memory (GPUs only).
    prefetch: blocks whose parameters are gathered ahead of the one that computes.
    """

    kind: Literal["fsdp2", "hsdp"]
    dp_replicate: Size = "auto"
    dp_shard: Size = "auto"
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    prefetch: int = 1

    def __post_init__(self) -> None:
        for name in ("dp_replicate", "dp_shard"):
            value = getattr(self, name)
            if value != "auto" and value < 1:
                raise ConfigError(f"strategy.{name}={value}: must be at least 1, or auto")
        if self.prefetch < 0:
            raise ConfigError(f"strategy.prefetch={self.prefetch}: must be at least 0")


@dataclass(frozen=True)
class MeshShape:
    """Sizes by axis."""

    dp_replicate: int
    dp_shard: int

    @property
    def ranks(self) -> int:
        return self.dp_replicate * self.dp_shard

    def __str__(self) -> str:
        return f"dp_replicate {self.dp_replicate} x dp_shard {self.dp_shard}"


def mesh_shape(config: StrategyConfig, ranks: int, ranks_per_node: int) -> MeshShape:
    """The sizes for so many processes, `auto` filled in. Raises ConfigError, which names the nearest that fit."""
    wanted, shard = config.dp_replicate, config.dp_shard
    if wanted != "auto":
        replicate = wanted
    elif shard != "auto":
        replicate = max(1, ranks // shard)
    else:
        replicate = ranks // math.gcd(ranks, ranks_per_node) if config.kind == "hsdp" else 1
    if ranks % replicate:
        raise ConfigError(
            f"strategy.dp_replicate={replicate}: does not divide {ranks} processes; use {near(replicate, ranks)}"
        )
    if shard == "auto":
        shard = ranks // replicate
    if replicate * shard != ranks:
        fitting = f"use {near(shard, ranks)}" if wanted == "auto" else f"use {ranks // replicate} or auto"
        raise ConfigError(
            f"strategy.dp_shard={shard}: with dp_replicate={replicate} it makes {replicate * shard} processes, "
            f"there are {ranks}; {fitting}"
        )
    return MeshShape(replicate, shard)


def near(value: int, number: int) -> str:
    """The divisors of `number` next to `value`, in words."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = [d for d in divisors if d < value][-1:]
    above = [d for d in divisors if d > value][:1]
    return " or ".join(map(str, below + above))
