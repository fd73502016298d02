"""The pipeline schedules by name: which chunks of the model a rank holds, and how many micro-batches a schedule takes.

They are those of `torch.distributed.pipelining`. The model is cut into chunks of consecutive layers.
"""

from dataclasses import dataclass


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
