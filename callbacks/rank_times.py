"""The time and the tokens that a rank works on by itself, and what they say about a straggler.

Collectives make every rank's step as long as the slowest one's, so wall time does not tell which rank that is. What a
rank does without the others tells it: waiting for its data, callbacks before the forward pass, and the forward passes
of attention and experts, between which the collectives lie.
"""

from collections.abc import Iterable
from statistics import median_low
from typing import Any, NamedTuple

import torch
from torch import nn

from dsv3_lightning.model.block import ATTENTION
from dsv3_lightning.model.experts import Experts
from dsv3_lightning.training.clock import Clock

ALONE = (*ATTENTION.values(), Experts)  # modules whose forward pass has no collective
LEAST_SECONDS = 0.1  # a rank that is late by less than this is no straggler, however short the steps are


class RankTimes(NamedTuple):
    """One rank's numbers at a logged step, as they are exchanged; each a float.

    seconds, waited: per micro-batch since the last log, of everything and of waiting for data. host, compute: of the
    step's last micro-batch, in callbacks before the forward pass, and in the forward passes of `ALONE`. allocated,
    reserved: peak bytes. retries: allocations that succeeded only after cached memory was freed. slots: routed tokens
    that this rank's experts got in the step's last micro-batch.
    """

    seconds: float
    waited: float
    host: float
    compute: float
    allocated: float
    reserved: float
    retries: float
    slots: float


def step_seconds(ranks: list[RankTimes], micro_batches: int) -> list[float]:
    """The time of an optimizer step that each rank would need if it waited for no other, estimated.

    The slowest rank sets the time of all: the time without the longest wait for data and callbacks belongs to the rank
    with the slowest computation, and the others need less in proportion to their own.
    """
    host = [rank.waited + rank.host for rank in ranks]
    slowest, typical = max(rank.compute for rank in ranks), median_low(rank.compute for rank in ranks)
    common = max(0.0, max(rank.seconds for rank in ranks) - max(host))
    share = [rank.compute / slowest if typical > 0 else 1.0 for rank in ranks]
    return [(common * part + own) * micro_batches for part, own in zip(share, host, strict=True)]


def straggler(seconds: list[float], ratio: float) -> int | None:
    """The rank whose step takes `ratio` times the median rank's or longer, if any.

    >>> straggler([1.0, 1.1, 1.7], 1.5), straggler([1.0, 1.1, 1.2], 1.5), straggler([0.01, 0.01, 0.09], 1.5)
    (2, None, None)
    """
    slowest, typical = max(seconds), median_low(seconds)
    late = slowest >= ratio * typical and slowest - typical >= LEAST_SECONDS
    return seconds.index(slowest) if late else None


def by_stage(ranks: list[RankTimes], size: int) -> list[list[RankTimes]]:
    """Those of ranks with the same layers: in a pipeline of each stage, which has `size` ranks, else of all."""
    return [ranks[first : first + size] for first in range(0, len(ranks), size)]


def first_straggler(seconds: list[list[float]], ratio: float) -> int | None:
    """The first rank that is a straggler among those of its stage, if any. seconds: of each rank, by stage.

    >>> first_straggler([[1.0, 1.1], [4.0, 4.1]], 1.5), first_straggler([[1.0, 1.1], [4.0, 6.1]], 1.5)
    (None, 3)
    """
    late = [(stage, rank) for stage, of_stage in enumerate(seconds)
            if (rank := straggler(of_stage, ratio)) is not None]  # fmt: skip
    return sum(map(len, seconds[: late[0][0]])) + late[0][1] if late else None


def highest(values: Iterable[float | None]) -> float | None:
    """The highest of the values that are not None."""
    return max((value for value in values if value is not None), default=None)


def max_over_mean(values: list[float]) -> float | None:
    """1 if all are equal; None if all are 0.

    >>> max_over_mean([3.0, 1.0]), max_over_mean([0.0])
    (1.5, None)
    """
    return max(values) * len(values) / sum(values) if sum(values) else None


class OwnWork:
    """Measures the forward passes of the modules `ALONE` while it is open; on CUDA by events, without waiting."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.clock = Clock(device)
        self.begun: dict[nn.Module, Any] = {}
        self.passes: list[tuple[Any, Any]] = []
        self.slots = 0
        own = [child for child in module.modules() if isinstance(child, ALONE)]
        self.hooks = [child.register_forward_pre_hook(self.begin) for child in own]
        self.hooks += [child.register_forward_hook(self.end) for child in own]

    def begin(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if isinstance(module, Experts):
            self.slots += len(arguments[0])
        self.begun[module] = self.clock.now()

    def end(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self.passes.append((self.begun.pop(module), self.clock.now()))

    def close(self) -> float:
        """Removes the hooks and returns the seconds. Waits for the device."""
        for hook in self.hooks:
            hook.remove()
        self.clock.wait()
        return sum(self.clock.seconds(start, end) for start, end in self.passes)
