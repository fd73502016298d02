"""When each rank does what: the simulation of a schedule from the times of its actions.

An action starts when its rank is free and what it needs has arrived. A transfer takes the same time for each edge and
keeps no rank busy; transfers don't wait for each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from dsv3_lightning.planning.pipeline.actions import Action, Slot


class Times(Protocol):
    """Seconds of a slot: of one action, or of a forward and a backward pass that run together."""

    def __call__(self, slot: Slot) -> float: ...


@dataclass(frozen=True)
class ChunkTimes:
    """Seconds of each chunk's actions for one micro-batch; the whole backward pass takes I + W.

    together: seconds of a forward and a backward pass that run together, as a share of the sum of both. 1: no overlap.
    """

    F: Sequence[float]
    I: Sequence[float]  # noqa: E741  the literature's letter
    W: Sequence[float]
    together: float = 1.0

    def __call__(self, slot: Slot) -> float:
        seconds = sum(self.of(action) for action in slot)
        return seconds * self.together if len(slot) > 1 else seconds

    def of(self, action: Action) -> float:
        kinds = "IW" if action.kind == "B" else action.kind
        return sum(getattr(self, kind)[action.chunk] for kind in kinds)

    @classmethod
    def equal(cls, chunks: int, F: float = 1.0, I: float = 1.0, W: float = 1.0, together: float = 1.0) -> "ChunkTimes":  # noqa: E741
        return cls([F] * chunks, [I] * chunks, [W] * chunks, together)


class Event(NamedTuple):
    """A slot with its start and its end, in seconds."""

    slot: Slot
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The events of each rank in a step, in order, simulated or measured."""

    ranks: list[list[Event]]

    @property
    def start(self) -> float:
        return min(events[0].start for events in self.ranks)

    @property
    def span(self) -> float:
        """Seconds from the first start to the last end: the optimizer steps when all ranks are done."""
        return max(events[-1].end for events in self.ranks) - self.start

    def busy(self, rank: int) -> float:
        return sum(event.end - event.start for event in self.ranks[rank])

    @property
    def idle(self) -> list[float]:
        """Seconds of the span in which each rank does nothing."""
        return [self.span - self.busy(rank) for rank in range(len(self.ranks))]

    @property
    def idle_within(self) -> list[float]:
        """The same from each rank's first to its last action, where others needn't be waited for (arXiv 2401.10241)."""
        return [events[-1].end - events[0].start - self.busy(rank) for rank, events in enumerate(self.ranks)]

    @property
    def bubble_share(self) -> float:
        """The share of all ranks' time, of the whole span, in which they do nothing."""
        return sum(self.idle) / (self.span * len(self.ranks))

    @property
    def own_bubble_share(self) -> float:
        """The same of each rank's own time, from its first to its last action."""
        within = sum(self.idle_within)
        return within / (within + sum(self.busy(rank) for rank in range(len(self.ranks))))


def simulate(slots: list[list[Slot]], times: Times, chunks: int, transfer: float = 0.0) -> Timeline:
    """The timeline of a schedule. chunks: of the whole model. transfer: seconds between ranks, per edge.

    Raises ValueError for lists that wait for each other.
    """
    rank_of = {action.chunk: rank for rank, mine in enumerate(slots) for slot in mine for action in slot}
    ends: dict[Action, float] = {}
    done: list[list[Event]] = [[] for _ in slots]

    def arrival(action: Action) -> float | None:
        """When the last of what an action needs is there; None: not known yet."""
        latest = 0.0
        for need in needs(action, chunks):
            options = [ends[each] for each in need if each in ends]
            if not options:
                return None
            source = need[0].chunk
            latest = max(latest, options[0] + (transfer if rank_of[source] != rank_of[action.chunk] else 0.0))
        return latest

    progress = True
    while progress:
        progress = False
        for rank, mine in enumerate(slots):
            while len(done[rank]) < len(mine):
                slot = mine[len(done[rank])]
                arrivals = [arrival(action) for action in slot]
                known = [each for each in arrivals if each is not None]
                if len(known) < len(slot):
                    break
                start = max(known + [done[rank][-1].end if done[rank] else 0.0])
                end = start + times(slot)
                ends.update(dict.fromkeys(slot, end))
                done[rank].append(Event(slot, start, end))
                progress = True
    stuck = [str(mine[len(events)][0]) for mine, events in zip(slots, done, strict=True) if len(events) < len(mine)]
    if stuck:
        raise ValueError(f"these actions wait for each other: {', '.join(stuck)}")
    return Timeline(done)


def needs(action: Action, chunks: int) -> list[tuple[Action, ...]]:
    """What must be done before an action, one of each tuple: a gradient comes from the next chunk's `I` or its `B`."""
    kind, chunk, m = action
    if kind == "F":
        return [(Action("F", chunk - 1, m),)] if chunk else []
    if kind == "W":
        return [(Action("I", chunk, m),)]
    forward = (Action("F", chunk, m),)
    return [forward, (Action("I", chunk + 1, m), Action("B", chunk + 1, m))] if chunk + 1 < chunks else [forward]


class Held(NamedTuple):
    """What a chunk holds of one micro-batch. kept: from the start of the forward to that of the backward pass.

    backward, splitting: at the most during a whole backward pass, or its input part. waiting: from there to the end of
    the weight part.
    """

    kept: float
    backward: float
    splitting: float
    waiting: float


def peak_live(events: Sequence[Event], held: Sequence[Held]) -> float:
    """The most that a rank holds for backward passes, which end with a whole one or with its weight part. held: by
    chunk."""
    changes = []
    for slot, start, end in events:
        for action in slot:
            kept, backward, splitting, waiting = held[action.chunk]
            if action.kind == "F":
                changes.append((start, 1, kept))
            elif action.kind == "W":
                changes.append((end, 0, -waiting))
            else:
                during, after = (backward, 0.0) if action.kind == "B" else (splitting, waiting)
                changes += [(start, 1, during - kept), (end, 0, after - during)]
    now = most = 0.0
    for _, _, change in sorted(changes):  # at the same moment what ends is freed first
        now += change
        most = max(most, now)
    return most


def peak_chunks(events: Sequence[Event]) -> float:
    """The most chunks of a micro-batch that a rank has begun and not ended, as the published formulas count them."""
    chunks = 1 + max(action.chunk for event in events for action in event.slot)
    return peak_live(events, [Held(1.0, 1.0, 1.0, 1.0)] * chunks)
