"""The order of the samples: each once, and as good as drawn at random, from any position and in no memory."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest

from dsv3_lightning.data.batches import permutation
from dsv3_lightning.data.batches.permutation import permuted
from dsv3_lightning.data.batches.sampling import Layout, TrainSampler, order

MANY = 3_600_000_000  # samples of 4,096 tokens in 14.8 T
EDGES = [2**k + d for k in (9, 10, 12, 16) for d in (-1, 0, 1)]


def whole(count: int, seed: int, epoch: int) -> np.ndarray:
    return permuted(np.arange(count), count, seed, epoch)


@pytest.mark.parametrize("count", [range(1, 301), [*EDGES, 99_991, 250_000]])
def test_each_number_comes_once(count: list[int]) -> None:
    for size in count:
        assert np.array_equal(np.sort(whole(size, 3, 1)), np.arange(size)), size


def test_it_is_the_feistel_network_of_the_docstring() -> None:
    """Worked out with Python's integers; a resumed run relies on it, whatever the versions."""
    M = 2**64

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % M
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % M
        x = (x ^ x >> 27) * 0x94D049BB133111EB % M
        return x ^ x >> 31

    def expected(position: int, count: int, seed: int, epoch: int) -> int:
        a = next(a for a in itertools.count(2, 2) if a * a >= count)
        b = math.ceil(count / a)
        while True:
            halves = list(divmod(position, b))
            for n in range(24):
                key = (mix((mix(seed % M) + epoch) % M) + (n + 1) * 0xD1B54A32D192ED03) % M
                halves[n % 2] = (halves[n % 2] + mix(halves[1 - n % 2] ^ key)) % (a, b)[n % 2]
            position = halves[0] * b + halves[1]
            if position < count:
                return position

    assert mix(0) == 0xE220A8397B1DCDAF  # the first output of the published splitmix64 for seed 0
    for count, seed, epoch in ((1, 1, 0), (9, 1, 1), (17, -1, 0), (64, 2**70 + 5, 3), (MANY, 7, 2)):
        positions = np.arange(min(count, 30)) * max(1, count // 30)
        numbers = [expected(int(position), count, seed, epoch) for position in positions]
        assert permuted(positions, count, seed, epoch).tolist() == numbers
        assert [permuted(int(position), count, seed, epoch) for position in positions] == numbers


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [whole(1000, seed, epoch) for seed in (0, 1, 2, -1, 2**63) for epoch in (0, 1, 2, 1000)]
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).sum() < 10  # of two random orders: 1 on average
    positions = np.arange(40).reshape(2, 20)
    epochs = np.arange(40).reshape(2, 20) // 8
    mixed = permuted(positions % 8, 8, 5, epochs)
    assert np.array_equal(mixed.reshape(5, 8), [whole(8, 5, epoch) for epoch in range(5)])


def z_scores(count: int, orders: int) -> dict[str, float]:
    """How far each statistic of the orders is from that of random ones, in standard deviations.

    cells: chi-square of positions against samples, in 16 x 16 cells. serial: correlation of neighbors in an order.
    pairs: neighbors in the order that are neighbors in the corpus, of which random orders have 2 on average, or that
    keep a distance: chi-square of differences in 16 cells, with one of triangular shape for random ones.
    epochs: correlation of the same position in the following epoch. parity: odd permutations among small ones.
    """
    found = np.stack([whole(count, 11, epoch) for epoch in range(orders)])
    cells = np.histogram2d(
        np.tile(np.arange(count), orders), found.ravel(), bins=16, range=[[0, count], [0, count]]
    )[0]  # fmt: skip
    expected = orders * count / 256
    chi = ((cells - expected) ** 2 / expected).sum()
    # an order fills each row and column of cells exactly, so that 15² are free, and their variance is a little smaller
    left, right = found[:, :-1] - (count - 1) / 2, found[:, 1:] - (count - 1) / 2
    serial = (left * right).mean() / found[0].var()
    near = (np.abs(np.diff(found, axis=1)) == 1).sum()
    edges = np.linspace(-count, count, 17)
    differences = np.histogram(np.diff(found, axis=1), bins=edges)[0]
    middle = (edges[:-1] + edges[1:]) / 2
    share = (count - np.abs(middle)) / count**2 * (edges[1] - edges[0])
    total = orders * (count - 1)
    chi_pairs = ((differences - total * share) ** 2 / (total * share)).sum()
    epochs = np.corrcoef(found[:-1].ravel(), found[1:].ravel())[0, 1]
    return {
        "cells": (chi - 225) / math.sqrt(2 * 225),
        "serial": (serial + 1 / (count - 1)) * math.sqrt(total),
        "adjacent": (near - 2 * orders * (count - 1) / count) / math.sqrt(2 * orders),
        "pairs": (chi_pairs - 15) / math.sqrt(2 * 15),
        "epochs": epochs * math.sqrt((orders - 1) * count),
    }


@pytest.mark.parametrize(("count", "orders"), [(4096, 60), (5000, 60), (65_537, 8)])
def test_the_shuffle_is_like_a_random_one(count: int, orders: int) -> None:
    scores = z_scores(count, orders)
    assert all(abs(score) < 4.5 for score in scores.values()), scores


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_statistics_see_a_weak_network(monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    monkeypatch.setattr(permutation, "ROUNDS", rounds)
    scores = z_scores(4096, 60)
    assert max(abs(score) for score in scores.values()) > 20, scores


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_all_orders_of_a_few_samples_are_equally_likely(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def score(epochs: int = 6000) -> float:
        drawn = permuted(np.tile(np.arange(count), epochs), count, 11, np.repeat(np.arange(epochs), count))
        seen = np.unique(drawn.reshape(-1, count), axis=0, return_counts=True)[1]
        orders, expected = math.factorial(count), epochs / math.factorial(count)
        chi = ((seen - expected) ** 2 / expected).sum() + (orders - len(seen)) * expected
        return (chi - (orders - 1)) / math.sqrt(2 * (orders - 1))

    assert score() < 4.5
    if count > 3:
        monkeypatch.setattr(permutation, "ROUNDS", 4)
        assert score() > 20


def test_any_of_billions_of_samples_without_memory() -> None:
    """Positions at the ends and between, in the first epoch and a later one; a stored order would be 29 GB."""
    tracemalloc.start()
    few = np.array([0, 1, MANY // 2, MANY - 1])
    first, later = permuted(few, MANY, 1, 0), permuted(few, MANY, 1, 5)
    alone = [permuted(int(position), MANY, 1, 0) for position in few]
    sampler = TrainSampler(MANY, Layout(15_360, 30, 256, 255), 1, 300_000, first_step=234_000, first_sample=MANY - 8)
    micro_batch = next(iter(sampler))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6, peak  # of which the sampler's sizes of 300,000 steps are 2.4 MB
    assert alone == first.tolist() and len({*first, *later}) == 8
    assert ((first >= 0) & (first < MANY)).all() and ((later >= 0) & (later < MANY)).all()
    assert micro_batch.samples.tolist() == order(MANY - 8 + np.array([510, 511]), MANY, 1).tolist()


def test_billions_of_samples_are_spread_evenly() -> None:
    stretch = permuted(np.arange(10**9, 10**9 + 40_000), MANY, 1, 0)
    assert len(np.unique(stretch)) == 40_000
    hits = np.bincount(stretch // (MANY // 100), minlength=100)[:100]
    assert abs(((hits - 400) ** 2 / 400).sum() - 99) < 4.5 * math.sqrt(2 * 99)
    assert abs(np.corrcoef(stretch[:-1], stretch[1:])[0, 1]) < 4.5 / math.sqrt(40_000)
