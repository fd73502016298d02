"""Planned seconds of a chunk's passes for one micro-batch, from the plan's parts, and of pairs that overlap."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.planning.hardware import Hardware
from dsv3_lightning.planning.layout import Layout
from dsv3_lightning.planning.parts import COMPUTE, Part, Ways
from dsv3_lightning.planning.pipeline.actions import Action, Slot
from dsv3_lightning.planning.share import Share
from dsv3_lightning.planning.wires import EXCHANGE, EXCHANGE_FIRST, exchange


class ChunkCost(NamedTuple):
    """Seconds of a chunk and a micro-batch by pass. wires: its exchange of tokens. exposed: what of it computing waits
    for, without overlap between passes."""

    computing: Ways
    wires: Ways
    exposed: Ways


@dataclass(frozen=True)
class PlannedTimes:
    """Planned seconds of slots. chunks: their costs. overlap: in pairs the exchange runs under the other's computing.

    kept: the share of its speed that computing keeps beside an exchange.
    """

    chunks: Sequence[ChunkCost]
    overlap: bool
    kept: float

    def __call__(self, slot: Slot) -> float:
        if len(slot) == 1 or not self.overlap:
            return sum(self.of(action, "computing") + self.of(action, "exposed") for action in slot)
        computing, wires = (sum(self.of(action, name) for action in slot) for name in ("computing", "wires"))
        return beside(computing, wires, self.kept)

    def of(self, action: Action, name: str) -> float:
        """Seconds of an action: `computing`, `wires` or `exposed`."""
        ways: Ways = getattr(self.chunks[action.chunk], name)
        return {"F": ways.forward, "I": ways.inputs, "W": ways.weights, "B": ways.inputs + ways.weights}[action.kind]


def beside(computing: float, wires: float, kept: float) -> float:
    """Seconds of computing beside an exchange, which leaves it `kept` of its speed.

    >>> beside(10.0, 2.0, 0.75), beside(1.0, 3.0, 0.75)
    (10.5, 3.0)
    """
    return max(wires, computing + (1 - kept) * wires)


def planned_times(
    model: ModelConfig, hardware: Hardware, layout: Layout, shares: Sequence[Share], overlap: bool
) -> PlannedTimes:
    """The times of the chunks with these shares. Without tokens on the wires there is nothing to overlap."""
    one = replace(layout, work=replace(layout.work, micro_batches=1))
    costs = [chunk_cost(model, hardware, replace(one, share=share)) for share in shares]
    return PlannedTimes(costs, overlap, hardware.rate("overlap.kept"))


def chunk_cost(model: ModelConfig, hardware: Hardware, layout: Layout) -> ChunkCost:
    computing = [part for each in COMPUTE for part in each(model, hardware, layout) if part.ways]
    found = exchange(model, hardware, layout)
    shared = added(part for part in computing if part.name == "shared experts")
    first = added(part for part in found if part.name == EXCHANGE_FIRST)
    others = added(part for part in found if part.name == EXCHANGE)
    exposed = Ways(*(other + max(0.0, a - b) for other, a, b in zip(others, first, shared, strict=True)))
    return ChunkCost(added(computing), added(found), exposed)


def added(parts: Iterable[Part]) -> Ways:
    ways = [part.ways for part in parts if part.ways]
    return Ways(*(sum(numbers) for numbers in zip(*ways, strict=True))) if ways else Ways(0.0, 0.0, 0.0)
