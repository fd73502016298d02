"""Samples that a run leaves out after it has returned to an earlier step, as shifts of their numbers. Imports no torch.

A run draws samples 0, 1, 2, … of its order. A `Skip` makes the numbers larger from some position on, so that those in
between are never drawn. So the position in the data stays the number of samples drawn so far, a function of the step.
"""

from collections.abc import Sequence

Skip = tuple[int, int]  # after this many drawn samples, so many are left out


def shifted(position: int, skips: Sequence[Skip]) -> int:
    """The number in the run's order of the sample that is drawn after `position` others.

    >>> [shifted(position, [(4, 10)]) for position in (3, 4, 5)]
    [3, 14, 15]
    """
    return position + sum(length for at, length in skips if at <= position)


def skip_between(skips: Sequence[Skip], first: int, last: int) -> list[Skip]:
    """The skips of a run that returns to position `first` and continues with the sample that would follow at `last`.

    >>> skip_between([], 4, 6), skip_between([(4, 2)], 4, 6), skip_between([(4, 2)], 2, 6)
    ([(4, 2)], [(4, 2), (4, 2)], [(2, 6)])
    """
    kept = [(at, length) for at, length in skips if at <= first]
    return [*kept, (first, shifted(last, skips) - shifted(first, skips))]
