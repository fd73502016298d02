"""Whether two runs are the same run: every curve, point by point, to the last bit."""

from collections.abc import Mapping

History = Mapping[str, tuple[list[int], list[float]]]
TIMED = ("throughput/",)  # what depends on the machine and its load


def first_difference(first: History, second: History) -> str | None:
    """What differs at the earliest step, in words; None where all curves are equal to the bit.

    >>> first_difference({"loss": ([1, 2], [3.0, 2.0])}, {"loss": ([1, 2], [3.0, 2.5])})
    'step 2: loss is 2.0 and 2.5'
    >>> first_difference({"loss": ([1], [3.0])}, {"loss": ([1, 2], [3.0, 2.5])})
    'step 2: loss is missing and 2.5'
    """
    differing = []
    for tag in sorted({*first, *second}):
        if tag.startswith(TIMED):
            continue
        one, other = (dict(zip(*history.get(tag, ([], [])), strict=True)) for history in (first, second))
        for step in sorted({*one, *other}):
            if repr(one.get(step)) != repr(other.get(step)):  # text, so that NaN equals NaN
                shown = ["missing" if value is None else value for value in (one.get(step), other.get(step))]
                differing.append((step, f"step {step}: {tag} is {shown[0]} and {shown[1]}"))
                break
    return min(differing)[1] if differing else None


def points(history: History) -> tuple[int, int]:
    """The number of curves that are compared, and of their points."""
    counts = [len(steps) for tag, (steps, _) in history.items() if not tag.startswith(TIMED)]
    return len(counts), sum(counts)
