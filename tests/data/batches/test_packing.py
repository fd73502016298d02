"""Every token is predicted once, packing is the best fit that it claims to be, and groups of documents stay apart."""

from collections.abc import Callable
from dataclasses import fields
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_lightning.data.batches import packing
from dsv3_lightning.data.batches.concatenation import concatenate
from dsv3_lightning.data.batches.dataset import targets_of
from dsv3_lightning.data.batches.packing import PackedIndex, best_fit_decreasing, first_sample, pack, segment_start

Pack = Callable[..., PackedIndex]
LENGTHS = st.lists(st.one_of(st.integers(1, 12), st.integers(0, 70)), min_size=1, max_size=40)


def offsets_of(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint64)


def main_targets(index: PackedIndex, length: int, depth: int, mask_ends: bool) -> np.ndarray:
    """What the main head predicts over one epoch; a token stands for itself by its place in the file."""
    places = length + 1 + depth
    tokens, barrier = np.full((len(index), places), -1), np.full((len(index), places), places)
    limits = segment_start(index.continues, index.positions, mask_ends)
    for sample in range(len(index)):
        for piece in range(index.samples[sample], index.samples[sample + 1]):
            first, size = index.positions[piece], index.lengths[piece]
            assert (tokens[sample, first : first + size] == -1).all() and first + size <= places
            tokens[sample, first : first + size] = np.arange(index.starts[piece], index.starts[piece] + size)
            barrier[sample, first : first + size] = limits[piece]
    targets = targets_of(tokens, barrier, length)
    assert np.array_equal(index.target_counts, (targets != -100).sum(2))
    return targets[:, 0][targets[:, 0] != -100]


@given(LENGTHS, st.integers(1, 16), st.integers(0, 3))
@settings(max_examples=300, deadline=None)
def test_every_token_is_a_main_target_once(lengths: list[int], length: int, depth: int) -> None:
    offsets = offsets_of(lengths)
    index = pack(offsets, length, depth, mask_document_ends=True)
    begins = {int(offset) for offset, size in zip(offsets, lengths) if size}
    predicted = sorted(main_targets(index, length, depth, mask_ends=True).tolist())
    assert predicted == [token for token in range(sum(lengths)) if token not in begins]
    # Without the mask, a document's first token may be predicted too: unless it is its sample's first, and then once.
    leading = {int(start) for start in index.starts[index.samples[:-1]]}
    index = pack(offsets, length, depth)
    predicted = sorted(main_targets(index, length, depth, mask_ends=False).tolist())
    assert predicted == [token for token in range(sum(lengths)) if token not in begins & leading]


@given(LENGTHS, st.integers(1, 16), st.integers(0, 3), st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_chunks_change_nothing(lengths: list[int], length: int, depth: int, chunk: int) -> None:
    loss_spans = np.unique(np.linspace(0, sum(lengths), 6, dtype=np.int64)[1:-1])
    arguments = (offsets_of(lengths), length, depth, False, loss_spans if len(loss_spans) == 4 else None)
    whole = pack(*arguments)
    with mock.patch.object(packing, "CHUNK", chunk):
        parts = pack(*arguments)
    for field in fields(PackedIndex):
        assert np.array_equal(getattr(whole, field.name), getattr(parts, field.name))


def test_a_long_document_is_cut_with_stride_t() -> None:
    # T = 4, D = 2: samples of up to 7 places. 12 tokens: windows 0-6 and 4-10 predict 1-4 and 5-8; the tail 8-11 is
    # packed into 5 places, alone, since the next document (6 tokens) is cut as well: 12-17, and its tail 16-17.
    index = pack(offsets_of([12, 6, 3]), 4, 2)
    pieces = sorted(zip(index.starts.tolist(), index.lengths.tolist(), index.continues.tolist()))
    assert pieces == [(0, 7, False), (4, 7, True), (8, 4, True), (12, 6, False), (16, 2, True), (18, 3, False)]
    # Best fit: 8-11 leaves one place; 18-20 opens the next, and 16-17 joins it. In the order of the corpus:
    samples = [index.starts[a:b].tolist() for a, b in zip(index.samples, index.samples[1:])]
    assert samples == [[0], [4], [8], [12], [16, 18]]
    assert index.positions.tolist() == [0, 0, 0, 0, 0, 2]


def test_a_tail_is_not_predicted_from_another_document() -> None:
    # T = 6, D = 1: 0-2 (a document of 3), then the tail 9-11 of the document 3-11 (9 tokens: window 3-10, tail from 9).
    index = pack(offsets_of([3, 9]), 6, 1)
    samples = [index.starts[a:b].tolist() for a, b in zip(index.samples, index.samples[1:])]
    assert samples == [[0, 9], [3]]
    # Sample 0 holds 0 1 2 9 10 11 -. The main head predicts 1 2, not 9 (3-10 did), 10 11. The second one, from two
    # before: 2; 9 and 10 lie behind the barrier; 11 from 9. With the barrier forgotten it would be 5 and 4.
    assert index.target_counts.tolist() == [[4, 2], [6, 6]]
    assert segment_start(index.continues, index.positions, False).tolist() == [0, 3, 0]


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
@settings(max_examples=300, deadline=None)
def test_packing_is_best_fit_decreasing(lengths: list[int], capacity: int) -> None:
    free: list[int] = []  # the textbook: one item after the other, into the fullest bin that takes it
    for length in sorted(lengths, reverse=True):
        fits = [bin for bin, space in enumerate(free) if space >= length]
        best = min(fits, key=lambda bin: free[bin], default=len(free))
        free += [capacity] if best == len(free) else []
        free[best] -= length
    bins = best_fit_decreasing(np.array(lengths, dtype=np.int64), capacity)
    filled = np.bincount(bins, weights=lengths, minlength=len(free)) if lengths else np.zeros(0)
    assert sorted(capacity - filled) == sorted(free)


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_nothing_packs_to_nothing(lengths: list[int]) -> None:
    index = pack(offsets_of(lengths), 8, 1)
    assert len(index) == 0 and len(index.starts) == 0
    assert index.target_counts.shape == (0, 2)


def test_packing_is_deterministic_and_wide() -> None:
    lengths = np.random.default_rng(0).integers(1, 3000, 5000).tolist()
    first, second = pack(offsets_of(lengths), 512, 1), pack(offsets_of(lengths), 512, 1)
    for name in ("samples", "starts", "lengths", "positions", "continues"):
        assert np.array_equal(getattr(first, name), getattr(second, name))
    far = pack(offsets_of(lengths) + np.uint64(1 << 40), 512, 1)  # a corpus beyond 32-bit offsets
    assert np.array_equal(far.starts - (1 << 40), first.starts) and far.starts.dtype == np.int64


@given(LENGTHS, st.integers(1, 16), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_every_token_of_the_stream_is_a_main_target_once(lengths: list[int], length: int, depth: int) -> None:
    offsets = offsets_of(lengths)
    total, begins = sum(lengths), {int(offset) for offset, size in zip(offsets, lengths) if size}
    index = concatenate(offsets, length, depth)
    assert sorted(main_targets(index, length, depth, mask_ends=False).tolist()) == list(range(1, total))
    filled = np.add.reduceat(index.lengths, index.samples[:-1]) if len(index) else np.zeros(0)
    assert (filled[:-1] >= min(length + 1, total)).all()  # nothing is padded but the end
    index = concatenate(offsets, length, depth, mask_document_ends=True)
    predicted = sorted(main_targets(index, length, depth, mask_ends=True).tolist())
    assert predicted == [token for token in range(total) if token not in begins]


@given(LENGTHS, st.integers(1, 16), st.integers(0, 3), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_chunks_change_nothing_in_a_stream(lengths: list[int], length: int, depth: int, chunk: int) -> None:
    groups = [len(lengths) // 3, len(lengths) // 2]
    whole = concatenate(offsets_of(lengths), length, depth, groups=groups)
    with mock.patch.object(packing, "CHUNK", chunk):
        parts = concatenate(offsets_of(lengths), length, depth, groups=groups)
    for field in fields(PackedIndex):
        assert np.array_equal(getattr(whole, field.name), getattr(parts, field.name))


def test_a_stream_is_cut_with_stride_t() -> None:
    # T = 4, D = 1: samples of up to 6 places begin at 0, 4, 8 of the stream 0-2 | 3-9 | 10-11
    index = concatenate(offsets_of([3, 7, 2]), 4, 1)
    samples = [
        list(zip(index.starts[a:b].tolist(), index.lengths[a:b].tolist()))
        for a, b in zip(index.samples, index.samples[1:])
    ]
    assert samples == [[(0, 3), (3, 3)], [(4, 6)], [(8, 2), (10, 2)]]
    assert index.continues.tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("make", [pack, concatenate])
@given(LENGTHS, st.integers(1, 16), st.lists(st.integers(0, 40), max_size=3))
@settings(max_examples=100, deadline=None)
def test_no_sample_has_documents_of_two_groups(make: Pack, lengths: list[int], length: int, cuts: list[int]) -> None:
    offsets, groups = offsets_of(lengths), sorted(min(cut, len(lengths)) for cut in cuts)
    together = make(offsets, length, 1, groups=groups)
    begin = 0
    for first, last in zip([0, *groups], [*groups, len(lengths)]):
        alone = make(offsets[first : last + 1], length, 1)
        end = begin + len(alone)
        assert first_sample(together, int(offsets[first])) == begin
        pieces = slice(together.samples[begin], together.samples[end])
        for name in ("starts", "lengths", "positions", "continues"):
            assert np.array_equal(getattr(together, name)[pieces], getattr(alone, name))
        assert np.array_equal(together.target_counts[begin:end], alone.target_counts)
        begin = end
    assert begin == len(together)
