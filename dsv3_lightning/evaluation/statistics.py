"""Means with their standard errors, and statistics of repeated answers to a question. Imports no torch."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple


class Estimate(NamedTuple):
    """A mean over questions, and its standard error, which one question leaves unknown (nan)."""

    value: float
    error: float


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value per question.

    >>> estimate([0.0, 1.0])
    Estimate(value=0.5, error=0.5)
    """
    n = len(values)
    if not n:
        return Estimate(math.nan, math.nan)
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, math.nan)
    return Estimate(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n))


def centered(accuracy: Estimate, chance: float) -> Estimate:
    """Accuracy with 0 for guessing and 1 for all right: (accuracy - chance) / (1 - chance)."""
    return Estimate((accuracy.value - chance) / (1 - chance), accuracy.error / (1 - chance))


def pass_at(k: int, answers: int, right: int) -> float:
    """The unbiased estimate of the chance that one of k answers is right, from n of which c are: 1 - C(n-c, k)/C(n, k)
    (arXiv 2107.03374, eq. 1).

    >>> pass_at(1, 4, 1), pass_at(2, 4, 1), pass_at(4, 4, 1)
    (0.25, 0.5, 1.0)
    """
    return 1 - math.comb(answers - right, k) / math.comb(answers, k)


def powers_to(most: int) -> list[int]:
    """1, 2, 4 and so on, and the largest.

    >>> powers_to(6)
    [1, 2, 4, 6]
    """
    return sorted({*(1 << i for i in range(most.bit_length())), most})


def majority(votes: Sequence[str | None], right: Sequence[bool]) -> float:
    """Whether the most frequent answer is right; of equally frequent ones, the share of right ones. None doesn't vote.

    >>> majority(["4", "5", "4", None], [True, False, True, False]), majority(["4", "5"], [True, False])
    (1.0, 0.5)
    """
    counts = Counter(vote for vote in votes if vote is not None)
    if not counts:
        return 0.0
    first = [vote for vote, count in counts.items() if count == max(counts.values())]
    return sum(right[votes.index(vote)] for vote in first) / len(first)
