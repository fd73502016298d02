"""Sources mixed by weights: which sample of which source has a number in the run. Imports no torch.

A `Phase` is a stretch of the run with constant weights. Its weights are integers, quotas: in every window of as many
samples as their sum each source has exactly its quota, wherever the window begins, and in any other window it is less
than three samples off. Number n of a phase belongs to the source whose running share, rounded, grows at
n; of the numbers that the largest source leaves, the next one takes its share in the same way, and so on. So the source
of a number, and how many of that source came before, are a few divisions: nothing is drawn, and nothing is stored.

A source's samples follow each other in a permutation for each of its epochs. When a source has had as many epochs as it
may, another phase begins, in which the others keep the ratios of their weights.
"""

import hashlib
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, TypeVar

import numpy as np

from dsv3_lightning.data.batches.permutation import permuted

LARGEST = 1 << 30  # sum of the quotas: its square fits into int64
NEVER = 1 << 62  # the number of a sample that no run reaches

Numbers = TypeVar("Numbers", int, np.ndarray)  # int64
Weight = float | Fraction


class Phase(NamedTuple):
    """The run from sample number `first` on: each source's quota, and the samples that it has given before."""

    first: int
    quotas: tuple[int, ...]
    given: tuple[int, ...]


class Places(NamedTuple):
    """Where samples are: the number of their source, its epoch, and the sample among the source's, int64."""

    source: np.ndarray
    epoch: np.ndarray
    sample: np.ndarray


@dataclass(frozen=True)
class Mixture:
    """The order of a run over several sources, a function of a sample's number in the run alone.

    counts: samples of each source. firsts: the first of them in the packed index. phases: those of `plan`.
    end: the number of samples after which every source has had its epochs; None: never.
    """

    counts: tuple[int, ...]
    firsts: tuple[int, ...]
    phases: tuple[Phase, ...]
    end: int | None
    seed: int

    def samples(self, numbers: np.ndarray) -> np.ndarray:
        """The samples of the packed index with these numbers in the run: int64 of the same shape."""
        places = self.places(numbers)
        return np.array(self.firsts, dtype=np.int64)[places.source] + places.sample

    def places(self, numbers: np.ndarray) -> Places:
        """Each of the shape of `numbers`, which are below `end`."""
        places = Places(*(np.empty(numbers.shape, dtype=np.int64) for _ in range(3)))
        of_phase = np.searchsorted([phase.first for phase in self.phases], numbers, "right") - 1
        for number in np.unique(of_phase):
            phase, here = self.phases[number], of_phase == number
            source, nth = deal(numbers[here] - phase.first, phase.quotas)
            nth = nth + np.array(phase.given, dtype=np.int64)[source]
            count = np.array(self.counts, dtype=np.int64)[source]
            places.source[here], places.epoch[here] = source, nth // count
            places.sample[here] = nth % count
        for k in np.unique(places.source).tolist():
            of = places.source == k
            seed = self.seed + (k << 32)  # a seed has 32 bits: each source has permutations of its own
            places.sample[of] = permuted(places.sample[of], self.counts[k], seed, places.epoch[of])
        return places

    def given(self, number: int) -> list[int]:
        """How many of the run's first `number` samples are of each source."""
        phase = self.phases[bisect_right(self.phases, number, key=lambda phase: phase.first) - 1]
        return [a + b for a, b in zip(phase.given, dealt(number - phase.first, phase.quotas), strict=True)]

    def digest(self, number: int) -> str:
        """A hash of what determines the run's first `number` samples, but for the packed index; 16 hexadecimal digits.

        So what follows may change: the weights of later phases, and epochs that no source has reached.
        """
        begun = [phase for phase in self.phases if phase.first < number] or [self.phases[0]]
        parts = self.counts, self.firsts, tuple(map(tuple, begun)), self.seed
        return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def plan(
    counts: Sequence[int], weights: Sequence[tuple[int, Sequence[Weight]]], limits: Sequence[int | None]
) -> tuple[tuple[Phase, ...], int | None]:
    """The phases of a run, and the number of samples after which no source has any left; None: never.

    counts: samples of each source. weights: (number of the first sample, each source's weight from there on), rising,
    from sample 0 on. limits: samples that each source gives at most.
    """
    phases: list[Phase] = []
    first, given = 0, [0] * len(counts)
    for number, (_, wanted) in enumerate(weights):
        until = weights[number + 1][0] if number + 1 < len(weights) else None
        while first < (NEVER if until is None else until):
            left = [limit is None or have < limit for have, limit in zip(given, limits, strict=True)]
            quotas = quotas_of([weight if more else 0 for weight, more in zip(wanted, left, strict=True)])
            if not any(quotas):
                return tuple(phases), first
            phases.append(Phase(first, tuple(quotas), tuple(given)))
            ends = [
                first_with(limit - have, k, quotas)
                for k, (limit, have) in enumerate(zip(limits, given, strict=True))
                if limit is not None and quotas[k]
            ]
            lengths = ends if until is None else [*ends, until - first]
            if not lengths:
                return tuple(phases), None
            length = min(lengths)
            given = [a + b for a, b in zip(given, dealt(length, quotas), strict=True)]
            first += length
    return tuple(phases), None


def quotas_of(weights: Sequence[Weight]) -> list[int]:
    """Integers in the ratio of the weights as they are written in decimal, the smallest ones.

    If their sum were above LARGEST, it is LARGEST, and they are the nearest ones, but 1 for every positive weight.

    >>> quotas_of([0.5, 0.3, 0.2]), quotas_of([1, 0, 3]), quotas_of([0, 0])
    ([5, 3, 2], [1, 0, 3], [0, 0])
    """
    exact = [Fraction(str(weight)) for weight in weights]
    if not any(exact):
        return [0] * len(exact)
    common = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * common) for weight in exact]
    divisor = math.gcd(*whole)
    if sum(whole) // divisor <= LARGEST:
        return [number // divisor for number in whole]
    shares = [weight * LARGEST / sum(exact) for weight in exact]
    rounded = [max(int(share), int(share > 0)) for share in shares]
    rounded[rounded.index(max(rounded))] += LARGEST - sum(rounded)  # a few of 2^30
    return rounded


def deal(numbers: np.ndarray, quotas: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The source of each number of a phase, and how many of that source come before it, int64 [n] each.

    >>> deal(np.arange(10), [5, 3, 2])[0].tolist()
    [0, 1, 0, 2, 0, 1, 0, 2, 0, 1]
    """
    source, nth = np.full(numbers.shape, -1, dtype=np.int64), np.zeros(numbers.shape, dtype=np.int64)
    rest, total = numbers.astype(np.int64), sum(quotas)
    for k in largest_first(quotas):
        before = rounded_share(rest, quotas[k], total)
        mine = (source < 0) & (rounded_share(rest + 1, quotas[k], total) > before)
        source[mine], nth[mine] = k, before[mine]
        rest, total = rest - before, total - quotas[k]
    return source, nth


def dealt(number: int, quotas: Sequence[int]) -> list[int]:
    """How many of a phase's first `number` samples are of each source."""
    counts, rest, total = [0] * len(quotas), number, sum(quotas)
    for k in largest_first(quotas):
        counts[k] = rounded_share(rest, quotas[k], total)
        rest, total = rest - counts[k], total - quotas[k]
    return counts


def first_with(samples: int, source: int, quotas: Sequence[int]) -> int:
    """The smallest number of a phase's samples, up to NEVER, with so many of the source, whose quota isn't 0."""
    enough = min(-(-samples // quotas[source]) * sum(quotas), NEVER)
    return bisect_left(range(enough), samples, key=lambda number: dealt(number, quotas)[source])


def largest_first(quotas: Sequence[int]) -> list[int]:
    return sorted((k for k in range(len(quotas)) if quotas[k]), key=lambda k: -quotas[k])


def rounded_share(number: Numbers, quota: int, total: int) -> Numbers:
    """number · quota / total, rounded, in int64 although the product may not fit."""
    whole, rest = number // total, number % total
    return whole * quota + (rest * quota + total // 2) // total
