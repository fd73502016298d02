"""The pipeline schedules by name: which chunks of the model a rank holds, and how many micro-batches a schedule takes.

They are those of `torch.distributed.pipelining`. The model is cut into chunks of consecutive layers.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Schedule:
    """A pipeline schedule. chunks: of a rank by default, and at least; 1: exactly one.

    v_shaped: rank r of P holds chunks r and 2P − 1 − r, so that the first and the last chunk share a rank; otherwise
        rank r holds chunks r, r + P, and so on. splits: the backward pass is split into input and weight parts.
    torch_name: the class in `torch.distributed.pipelining`.
    """

    chunks: int
    v_shaped: bool
    splits: bool
    torch_name: str


SCHEDULES = {
    "1f1b": Schedule(1, False, False, "Schedule1F1B"),
    "interleaved_1f1b": Schedule(2, False, False, "ScheduleInterleaved1F1B"),
    "interleaved_zero_bubble": Schedule(2, False, True, "ScheduleInterleavedZeroBubble"),
    "zbv": Schedule(2, True, True, "ScheduleZBVZeroBubble"),
    "dualpipev": Schedule(2, True, True, "ScheduleDualPipeV"),
}


def valid_chunks(schedule: Schedule, chunks: int) -> bool:
    """Whether a rank can hold this many chunks under a schedule."""
    return chunks >= 2 if schedule.chunks > 1 and not schedule.v_shaped else chunks == schedule.chunks


def placement(schedule: Schedule, ranks: int, chunks: int | None = None) -> list[list[int]]:
    """The chunks of each rank, in the order of the model. chunks: of a rank; None: the schedule's own number."""
    if schedule.v_shaped:
        return [[rank, 2 * ranks - 1 - rank] for rank in range(ranks)]
    return [[rank + ranks * i for i in range(chunks or schedule.chunks)] for rank in range(ranks)]


def fitting_micro_batches(name: str, ranks: int, wanted: int) -> int:
    """The number of micro-batches nearest to the wanted one that a schedule takes on this many ranks; ties go up.

    1F1B takes P or more, DualPipeV 2P or more. Interleaved ones work in max(1, M // P) rounds, which must divide M.
    """
    if name in ("1f1b", "dualpipev"):
        return max(wanted, ranks if name == "1f1b" else 2 * ranks)
    if name == "zbv":
        return max(wanted, 1)
    valid = [m for m in range(1, max(wanted, 1) + ranks + 1) if m % max(1, m // ranks) == 0]
    return min(valid, key=lambda m: (abs(m - wanted), -m))


def limit_waiting(order: Sequence[T], limit: int | None, part: Callable[[T], tuple[str, Hashable] | None]) -> list[T]:
    """A rank's actions, where no more weight parts than `limit` wait at a time; None: no limit.

    The weight part that waits longest is moved before the input part that would be one too many. part: of an action
    that is one, its kind, `I` or `W`, and its chunk and micro-batch.

    >>> "".join(limit_waiting("abcABC", 2, lambda x: ("I" if x.islower() else "W", x.lower())))
    'abAcBC'
    """
    weight_parts = {found[1]: action for action in order if (found := part(action)) and found[0] == "W"}
    waiting: list[Hashable] = []
    done: set[Hashable] = set()
    result = []
    for action in order:
        kind, key = part(action) or ("", None)
        if kind == "W" and key in done:
            continue
        if kind == "I":
            if len(waiting) == limit:
                done.add(waiting[0])
                result.append(weight_parts[waiting.pop(0)])
            waiting.append(key)
        elif kind == "W":
            waiting.remove(key)
        result.append(action)
    return result
