"""What each rank does in a step, in order, under each pipeline schedule.

The lists are those of `torch.distributed.pipelining`, in a shorter form; a test compares them. P is the number of ranks
and M that of micro-batches. Chunks and micro-batches count from 0.
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from dsv3_lightning.common.schedules import SCHEDULES, limit_waiting, valid_chunks


class Action(NamedTuple):
    """One piece of work. kind: `F` forward, `B` backward, `I` its input part, `W` its weight part."""

    kind: str
    chunk: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.chunk}{self.kind}{self.micro_batch}"


Slot = tuple[Action, ...]  # one action, or a forward and a backward pass that run together (F&B)


class Lane:
    """The list of one rank while it is made. Each kind of action of a chunk takes its micro-batches in order."""

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self.count: Counter[tuple[str, int]] = Counter()
        self.waiting: list[Action] = []  # weight parts whose input parts are done

    def next(self, kind: str, chunk: int) -> Action:
        counted = "I" if kind == "B" else kind
        action = Action(kind, chunk, self.count[counted, chunk])
        self.count[counted, chunk] += 1
        if kind == "I":
            self.waiting.append(Action("W", chunk, action.micro_batch))
        return action

    def do(self, *actions: tuple[str, int]) -> None:
        """Appends one action after the other, given as kind and chunk."""
        self.slots += [(self.next(*action),) for action in actions]

    def together(self, forward: int, backward: int) -> None:
        """Appends the forward pass of a chunk and the backward pass of another, as one."""
        self.slots.append((self.next("F", forward), self.next("B", backward)))

    def weight(self) -> None:
        """Appends the oldest weight part that is waiting, if there is one."""
        if self.waiting:
            self.slots.append((self.waiting.pop(0),))


def one_forward_one_backward(ranks: int, micro_batches: int, rank: int) -> list[Slot]:
    """1F1B (arXiv 2104.04473, figure 4)."""
    lane, ahead = Lane(), min(micro_batches, ranks - rank)
    lane.do(*[("F", rank)] * ahead)
    for i in range(micro_batches):
        lane.do(("B", rank))
        if ahead + i < micro_batches:
            lane.do(("F", rank))
    return lane.slots


def interleaved(ranks: int, micro_batches: int, rank: int, chunks: int, splits: bool) -> list[Slot]:
    """Interleaved 1F1B (arXiv 2104.04473 §2.2) and, with the backward pass split, interleaved zero bubble.

    Each round takes a few micro-batches through all chunks of the rank. A weight part follows as many input parts later
    as the rank's number (ZB-H1, arXiv 2401.10241 §3).
    """
    lane, total = Lane(), micro_batches * chunks
    in_round = micro_batches // max(1, micro_batches // ranks)
    ahead = min((chunks - 1) * in_round + (1 if splits else 2) * (ranks - 1 - rank), total)

    def chunk_of(i: int) -> int:
        return i // in_round % chunks * ranks + rank

    lane.do(*[("F", chunk_of(i)) for i in range(ahead)])
    for i in range(total):
        if ahead + i < total:
            lane.do(("F", chunk_of(ahead + i)))
        last = (chunks - 1) * ranks + 2 * rank
        lane.do(("I" if splits else "B", last - chunk_of(i)))
        if i >= rank:
            lane.weight()
    while lane.waiting:
        lane.weight()
    return lane.slots


def zbv(ranks: int, micro_batches: int, rank: int) -> list[Slot]:
    """ZB-V (arXiv 2401.10241 §6)."""
    lane, first, last = Lane(), rank, 2 * ranks - 1 - rank
    full = max(micro_batches, 2 * ranks - 1)  # so many fill the pipeline; those that aren't there are left out
    lane.do(*[("F", first)] * (2 * (ranks - rank) - 1))
    lane.do(*[("F", last), ("F", first)] * rank)
    lane.do(*[("F", last), ("I", last), ("W", last)] * (ranks - rank))
    while lane.count["F", last] < full:
        if lane.count["F", first] < full:
            lane.do(("F", first))
        lane.do(("I", first), ("W", first), ("F", last), ("I", last), ("W", last))
    lane.do(*[("I", first), ("I", last)] * rank)
    lane.do(*[("I", first), ("W", first)] * (ranks - rank))
    for chunk in (last, first):
        lane.do(*[("W", chunk)] * (full - lane.count["W", chunk]))
    return [slot for slot in lane.slots if slot[0].micro_batch < micro_batches]


def dualpipev(ranks: int, micro_batches: int, rank: int) -> list[Slot]:
    """DualPipeV (github.com/deepseek-ai/DualPipe): pairs of a forward and a backward pass that run together."""
    lane, first, last, behind = Lane(), rank, 2 * ranks - 1 - rank, ranks - 1 - rank
    lane.do(*[("F", first)] * (2 * behind))
    lane.do(*[("F", first), ("F", last)] * (rank + 1))
    for _ in range(behind):
        lane.do(("I", last))
        lane.weight()
        lane.do(("F", last))
    for i in range(micro_batches - 2 * ranks + rank + 1):
        if i == 0 and behind == 0:  # apart, which makes the bubble smaller
            lane.do(("F", first), ("B", last))
        else:
            lane.together(first, last)
        lane.together(last, first)
    for _ in range(behind):
        lane.do(("B", last))
        lane.together(last, first)
    # the second half of what is left is split, so that its weight parts fill the last gaps
    ends = [last, first] * (rank + 1)
    split_from = 2 * ((rank + 1) // 2) + (rank % 2 == 0)
    lane.do(*[("I" if i >= split_from else "B", chunk) for i, chunk in enumerate(ends)])
    for _ in range(behind):
        lane.weight()
        lane.do(("I", first))
    while lane.waiting:
        lane.weight()
    return lane.slots


def split_part(slot: Slot) -> tuple[str, tuple[int, int]] | None:
    """The kind of a slot that is one part of a backward pass, and of which."""
    kind, *which = slot[0]
    return (kind, (which[0], which[1])) if len(slot) == 1 and kind in "IW" else None


def schedule_slots(
    name: str, ranks: int, micro_batches: int, chunks: int | None = None, waiting: int | None = None
) -> list[list[Slot]]:
    """The slots of each rank. chunks: of a rank; None: the schedule's own number. waiting: strategy.waiting_weights."""
    schedule = SCHEDULES[name]
    chunks = chunks or schedule.chunks
    assert valid_chunks(schedule, chunks)
    of_rank: dict[str, Callable[[int], list[Slot]]] = {
        "1f1b": lambda rank: one_forward_one_backward(ranks, micro_batches, rank),
        "interleaved_1f1b": lambda rank: interleaved(ranks, micro_batches, rank, chunks, splits=False),
        "interleaved_zero_bubble": lambda rank: interleaved(ranks, micro_batches, rank, chunks, splits=True),
        "zbv": lambda rank: zbv(ranks, micro_batches, rank),
        "dualpipev": lambda rank: dualpipev(ranks, micro_batches, rank),
    }
    return [limit_waiting(of_rank[name](rank), waiting, split_part) for rank in range(ranks)]
