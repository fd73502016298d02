"""Rows that travel between ranks by one all-to-all, apart in two steps: they depart, and they land.

Between both, forward and backward, something else can be computed. In the backward pass the gradients leave where the
rows have landed and are waited for where these departed; autograd runs what was computed last first, so whatever was
computed between `depart` and `land` has its own backward pass during the way back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single

from dsv3_lightning.parallel.streams import arrived


class Other(Protocol):
    """Another computation, which goes on while gradients are under way.

    before: is called when gradients are ready to leave; after: when they have left.
    """

    def before(self) -> None: ...

    def after(self) -> None: ...


class Turns:
    """Whom the backward passes of this process give a turn to."""

    other: ClassVar[Other | None] = None  # of the process, since autograd has threads of its own for GPUs

    @staticmethod
    @contextmanager
    def given_to(other: Other) -> Iterator[None]:
        previous, Turns.other = Turns.other, other
        try:
            yield
        finally:
            Turns.other = previous


@dataclass
class Way:
    """sent, received: the numbers of rows to and from each rank of the group. turn: whether the backward pass gives a
    turn on this way. gradient: of the rows that were sent, on its way back."""

    sent: list[int]
    received: list[int]
    group: dist.ProcessGroup
    turn: bool = False
    gradient: Tensor | None = None


class Flight(NamedTuple):
    """Rows on their way."""

    rows: Tensor
    way: Way

    def land(self, turn: bool = False) -> Tensor:
        """The received rows, once they are there. Also a rank without any must call it. turn: see `Way`; only on the
        stream of the model's computation."""
        self.way.turn = turn
        return Land.apply(self.rows, self.way)


def depart(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Flight:
    """Sends rows [Σ sent, ...], sorted by rank. Every rank of the group must call it, in the same order."""
    way = Way(sent, received, group)
    return Flight(Depart.apply(rows, way), way)


class Depart(torch.autograd.Function):
    """Starts the exchange; waits for that of the gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: Way) -> Tensor:
        ctx.way = way
        return all_to_all_single(rows.contiguous(), way.received, way.sent, way.group)

    @staticmethod
    def backward(ctx: Any, _landed: Tensor) -> tuple[Tensor, None]:
        gradient, ctx.way.gradient = ctx.way.gradient, None
        return arrived(gradient), None


class Land(torch.autograd.Function):
    """Waits for the exchange; starts that of the gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: Way) -> Tensor:
        ctx.way = way
        return arrived(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        way = ctx.way
        other = Turns.other if way.turn else None
        if other is not None:
            other.before()
        way.gradient = all_to_all_single(grad.contiguous(), way.sent, way.received, way.group)
        if other is not None:
            other.after()
        return grad, None  # autograd wants the shape of what landed; `Depart` takes the other
