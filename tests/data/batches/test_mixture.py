"""Sources in exact shares, in one order for any number of ranks and any number of resumes."""

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest

from dsv3_lightning.data.batches.mixture import LARGEST, NEVER, Mixture, deal, dealt, plan, quotas_of
from dsv3_lightning.data.batches.sampling import Layout, TrainSampler
from dsv3_lightning.data.batches.skips import Skip

COUNTS, WEIGHTS = (40, 11, 5), (0.5, 0.3, 0.2)
SCHEDULE = [(0, WEIGHTS), (37, (1, 0, 3)), (101, (0.1, 0.8, 0.1))]


def mixture_of(
    counts: Sequence[int] = COUNTS,
    weights: Sequence[tuple[int, Sequence[float]]] = ((0, WEIGHTS),),
    limits: Sequence[int | None] | None = None,
    seed: int = 5,
) -> Mixture:
    phases, end = plan(counts, weights, limits or [None] * len(counts))
    firsts = itertools.accumulate(counts[:-1], initial=0)
    return Mixture(tuple(counts), tuple(firsts), phases, end, seed)


def drawn(mixture: Mixture, ranks: int, steps: range, skips: Sequence[Skip] = (), accumulate: int = 1) -> list[int]:
    """All samples in the order of step, micro-batch, rank, as drawn by a run that begins at the first step."""
    by_rank = [
        list(
            TrainSampler(
                sum(mixture.counts),
                Layout(8, accumulate, ranks, rank),
                5,
                steps.stop,
                first_step=steps.start,
                first_sample=steps.start * 8,
                skips=skips,
                mixture=mixture,
            )  # fmt: skip
        )
        for rank in range(ranks)
    ]
    return [int(sample) for same_time in zip(*by_rank) for micro_batch in same_time for sample in micro_batch.samples]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_and_resumes_share_one_order_while_the_weights_change(ranks: int) -> None:
    mixture = mixture_of(weights=SCHEDULE)
    whole = mixture.samples(np.arange(30 * 8)).tolist()
    assert drawn(mixture, 1, range(30)) == whole
    parts = [(1, range(4)), (ranks, range(4, 5)), (ranks, range(5, 13)), (4, range(13, 30))]  # interrupted three times
    assert [sample for count, steps in parts for sample in drawn(mixture_of(weights=SCHEDULE), count, steps)] == whole
    assert drawn(mixture, ranks, range(30), accumulate=2) == whole


@pytest.mark.parametrize(
    "weights", [(0.5, 0.3, 0.2), (1, 1, 1), (0.7, 0.1, 0.1, 0.1), (1, 2, 4, 8, 16), (0.999, 0.001), (3,), (0, 1, 0.5)]
)
def test_every_window_as_long_as_the_quotas_sum_has_exactly_the_quotas(weights: tuple[float, ...]) -> None:
    quotas = quotas_of(weights)
    length, total = sum(quotas), sum(map(lambda weight: Fraction(str(weight)), weights))
    assert [Fraction(quota, length) for quota in quotas] == [Fraction(str(weight)) / total for weight in weights]
    source, _ = deal(np.arange(3 * length), quotas)
    before = np.concatenate([np.zeros((1, len(weights)), int), np.eye(len(weights), dtype=int)[source].cumsum(0)])
    assert (before[length:] - before[:-length] == quotas).all()
    off = before - np.outer(np.arange(3 * length + 1), np.array(quotas) / length)
    assert (off.max(0) - off.min(0)).max() < 3  # of any window, however short


def test_a_sources_samples_are_counted_without_a_gap() -> None:
    rng = np.random.default_rng(0)
    for sources in (1, 2, 3, 7, 16):
        quotas = rng.integers(0, 50, sources).tolist()
        quotas[0] += 1
        numbers = np.arange(2 * sum(quotas) + 3)
        source, nth = deal(numbers, quotas)
        for k in range(sources):
            assert nth[source == k].tolist() == list(range((source == k).sum()))
        for number in (0, 1, 17, len(numbers)):
            assert dealt(number, quotas) == [int((source[:number] == k).sum()) for k in range(sources)]


def test_every_epoch_of_every_source_is_a_permutation_of_its_own() -> None:
    mixture = mixture_of(counts=(12, 12, 5), weights=[(0, (1, 1, 1)), (31, (5, 1, 1)), (80, (1, 2, 3))])
    places = mixture.places(np.arange(400))
    orders = []
    for k, count in enumerate(mixture.counts):
        of = places.source == k
        for epoch in range(3):
            samples = places.sample[of & (places.epoch == epoch)].tolist()
            assert sorted(samples) == list(range(count))
            orders.append(tuple(samples))
        assert (np.diff(places.epoch[of]) >= 0).all()
    assert len(set(orders)) == 9  # neither every epoch alike, nor sources of the same size
    assert mixture.given(400) == [int((places.source == k).sum()) for k in range(3)]


def test_a_source_that_has_had_its_epochs_leaves_its_share_to_the_others() -> None:
    mixture = mixture_of(weights=[(0, (2, 1, 1)), (50, (2, 3, 1))], limits=[None, 22, 7])
    places = mixture.places(np.arange(500))
    for k, limit in ((1, 22), (2, 7)):
        assert (places.source == k).sum() == limit
    last = int(np.flatnonzero(places.source == 2)[-1]) + 1  # the smallest ends first, in the middle of the first phase
    assert last < 50 and mixture.given(50)[1] - mixture.given(last)[1] == pytest.approx((50 - last) / 3, abs=1)
    assert (places.source[int(np.flatnonzero(places.source == 1)[-1]) + 1 :] == 0).all() and mixture.end is None
    phases, end = plan((40, 11), [(0, (1, 1))], [40, 22])
    assert end == 62 and dealt(end - phases[-1].first, phases[-1].quotas)[0] + phases[-1].given[0] == 40


def test_extreme_weights_never_leave_a_source() -> None:
    assert quotas_of([1, 1e-12, 0]) == [LARGEST - 1, 1, 0]
    assert quotas_of([1e-300, 1e300]) == [1, LARGEST - 1]
    assert quotas_of([1 / 3, 1 / 3, 1 / 3]) == [1, 1, 1] and sum(quotas_of([math.pi, math.e])) == LARGEST
    mixture = mixture_of(counts=(3, 1, 1000), weights=[(0, (1e-9, 1e-9, 1))])
    places = mixture.places(np.arange(0, 40 * LARGEST, LARGEST // 7919))
    assert (places.sample < np.array(mixture.counts)[places.source]).all() and (places.sample >= 0).all()
    assert mixture.given(7 * (10**9 + 2)) == [7, 7, 7 * 10**9]


def test_numbers_beyond_32_bits_are_exact() -> None:
    counts = (10**12 + 39, 3 * 10**10, 7)
    mixture = mixture_of(counts=counts, weights=[(0, (0.7, 0.299999999, 1e-9))])
    for number in (2**33 + 1, 2**45 + 3, 2**59 + 12345):
        window = np.arange(number, number + 1000)
        places = mixture.places(window)
        before, after = mixture.given(number), mixture.given(number + 1000)
        assert sum(before) == number and [int((places.source == k).sum()) for k in range(3)] == [
            b - a for a, b in zip(before, after, strict=True)
        ]
        for k, share in enumerate((7, 2.99999999, 1e-8)):
            assert abs(before[k] - number * share / 10) < 2 + number * 2**-50
        mine = places.source == 0  # in plain integers of any size
        assert places.epoch[mine].tolist() == [(before[0] + i) // counts[0] for i in range(mine.sum())]
        assert (places.sample >= 0).all() and (places.sample < np.array(counts)[places.source]).all()
    assert plan((7,), [(0, (1,))], [None]) == (((0, (1,), (0,)),), None)
    far, end = plan((10**18, 5), [(0, (1e-9, 1))], [10**18, None])  # it ends at a number that no run reaches
    assert end is None and all(phase.first <= NEVER for phase in far)


def test_a_change_of_later_weights_leaves_the_samples_before_as_they_are() -> None:
    planned, changed = mixture_of(weights=SCHEDULE), mixture_of(weights=[*SCHEDULE[:2], (101, (1, 0, 0))])
    assert np.array_equal(planned.samples(np.arange(101)), changed.samples(np.arange(101)))
    assert planned.digest(101) == changed.digest(101) and planned.digest(102) != changed.digest(102)
    assert planned.digest(0) == mixture_of().digest(0) != mixture_of(weights=[(0, (0.5, 0.2, 0.3))]).digest(0)
    assert len({mixture_of(seed=seed).digest(0) for seed in (1, 2)}) == 2
    assert mixture_of(counts=(40, 11, 6)).digest(0) != mixture_of().digest(0)


def test_samples_that_a_run_leaves_out_are_those_of_the_mixed_order() -> None:
    mixture = mixture_of(weights=SCHEDULE)
    whole = mixture.samples(np.arange(20 * 8)).tolist()
    assert drawn(mixture, 2, range(10), skips=[(24, 16)]) == whole[:24] + whole[40 : 80 + 16]
