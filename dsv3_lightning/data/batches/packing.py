"""Packing of documents into fixed-length samples as an index; the tokens aren't copied. Imports no torch.

T = sequence_length. A sample has S = T + 1 + mtp_depth positions: T inputs, their next tokens, and mtp_depth more that
only the MTP modules predict. Every token of a document but its first is the main head's target exactly once:

- A document of more than T + 1 tokens is cut with stride T. Each piece but the last fills a whole sample.
- Last pieces and whole documents are packed best-fit-decreasing into T + 1 positions (arXiv 2404.10830), untruncated.

The other way, concatenation, is in concatenation.py. In both, the documents may be in groups, the sources of a mixture:
no sample has documents of two groups, and the samples of a group follow each other.

Arrays that grow with the number of documents, tens of gigabytes for a billion, are allocated by the caller and may be
files. Memory holds one or two numbers per sample and a chunk of pieces.
"""

import hashlib
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

CHUNK = 1 << 16  # pieces at a time

Make = Callable[[str, tuple[int, ...], Any], np.ndarray]  # name, shape and dtype to an array


@dataclass(frozen=True)
class PackedIndex:
    """An index of samples as pieces of documents, in the order of the corpus.

    samples [samples + 1] int64: sample s consists of the pieces samples[s] .. samples[s + 1] - 1.
    starts, lengths [pieces] int64: the piece's tokens in the file. positions [pieces] int64: its begin in the sample.
    continues [pieces] bool: the piece begins inside a document; its first token is already a target at the end of the
        document's previous piece, which is in another sample.
    target_counts [samples, P] int64: valid targets of each prediction head.
    """

    samples: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    positions: np.ndarray
    continues: np.ndarray
    target_counts: np.ndarray

    def __len__(self) -> int:
        return len(self.samples) - 1

    def digest(self) -> str:
        """A hash of the tokens that each sample has, as 16 hexadecimal digits. Reads the whole index."""
        digest = hashlib.blake2b(digest_size=8)
        for part in (self.samples, self.starts, self.lengths):
            digest.update(part.data)  # without a copy: it may be larger than memory
        return digest.hexdigest()


def in_memory(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.empty(shape, dtype)


def pack(
    offsets: np.ndarray,
    sequence_length: int,
    mtp_depth: int,
    mask_document_ends: bool = False,
    loss_spans: np.ndarray | None = None,
    make: Make = in_memory,
    groups: Sequence[int] = (),
) -> PackedIndex:
    """Packs the documents that begin at offsets [documents + 1] into samples, deterministically.

    mask_document_ends, loss_spans: decide which targets are valid (see `segment_start`, TokenFile).
    make: also called for temporary arrays that are not part of the index.
    groups: the documents at which all groups but the first begin, rising.
    """
    offsets = np.asarray(offsets).astype(np.int64, copy=False)
    tails, pieces, documents = make("tails", (len(offsets) - 1,), np.int32), 0, 0
    for _, lengths, _, whole in cut_in_chunks(offsets, sequence_length, mtp_depth):
        ends = lengths[~whole]
        tails[documents : documents + len(ends)] = ends
        pieces, documents = pieces + len(lengths), documents + len(ends)
    bins, opened = make("bins", (documents,), np.int64), 0
    for low, high in pairwise([0, *(with_tokens(offsets, group) for group in groups), documents]):
        opened = place_best_fit(tails[low:high], sequence_length + 1, bins[low:high], opened, make)

    cuts = cut_in_chunks(offsets, sequence_length, mtp_depth)
    sample = make("sample", (pieces,), np.int64)
    samples = number_samples((whole for *_, whole in cuts), bins, sample, make)

    index = allocate(samples, mtp_depth, make)
    free, filled = samples[:-1].copy(), np.zeros(len(index), dtype=np.int32)  # the next piece's number and position
    begin = 0
    for starts, lengths, continues, _ in cut_in_chunks(offsets, sequence_length, mtp_depth):
        end = begin + len(starts)
        order = np.argsort(sample[begin:end], kind="stable")
        of, sizes, begin = sample[begin:end][order], lengths[order], end
        numbers = take_next(free, of)
        index.starts[numbers], index.lengths[numbers], index.continues[numbers] = starts[order], sizes, continues[order]
        first, count = runs(of)
        sums = running_sum(sizes)
        index.positions[numbers] = sums[:-1] + np.repeat(filled[of[first]] - sums[first], count)
        filled[of[first]] += np.diff(np.append(sums[first], sums[-1])).astype(np.int32)
    fill_target_counts(index, sequence_length, mtp_depth, mask_document_ends, loss_spans)
    return index


def allocate(samples: np.ndarray, mtp_depth: int, make: Make) -> PackedIndex:
    """An index of these samples, int64 [samples + 1], whose other arrays are still to be filled."""
    pieces = int(samples[-1])
    return PackedIndex(
        samples,
        starts=make("starts", (pieces,), np.int64),
        lengths=make("lengths", (pieces,), np.int64),
        positions=make("positions", (pieces,), np.int64),
        continues=make("continues", (pieces,), np.bool_),
        target_counts=make("target_counts", (len(samples) - 1, 1 + mtp_depth), np.int64),
    )


def fill_target_counts(
    index: PackedIndex, sequence_length: int, mtp_depth: int, mask_document_ends: bool, loss_spans: np.ndarray | None
) -> None:
    """Fills in `target_counts` from the other arrays."""
    samples, begin = index.samples, 0
    while begin < len(index):
        end = max(begin + 1, int(np.searchsorted(samples, samples[begin] + CHUNK, "right")) - 1)
        counts = count_targets(index, begin, end, sequence_length, mtp_depth, mask_document_ends, loss_spans)
        index.target_counts[begin:end] = counts
        begin = end


def with_tokens(offsets: np.ndarray, documents: int) -> int:
    """How many of the first `documents` have a token."""
    starts = range(0, documents, CHUNK)
    return sum(int(np.count_nonzero(np.diff(offsets[a : min(a + CHUNK, documents) + 1]))) for a in starts)


def first_sample(index: PackedIndex, token: int) -> int:
    """The first sample whose tokens are at this place in the file or later: the first one of a group.

    Reads a few numbers of the index, whatever its size.
    """
    return bisect_left(range(len(index)), token, key=lambda sample: int(index.starts[index.samples[sample]]))


def cut_in_chunks(
    offsets: np.ndarray, sequence_length: int, mtp_depth: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Yields `cut_documents` of groups of documents that have about CHUNK pieces."""
    begin, documents = 0, len(offsets) - 1
    while begin < documents:
        far = int(np.searchsorted(offsets, offsets[begin] + CHUNK * sequence_length, "right")) - 1
        end = max(begin + 1, min(begin + CHUNK, far))
        yield cut_documents(offsets[begin : end + 1], sequence_length, mtp_depth)
        begin = end


def cut_documents(
    offsets: np.ndarray, sequence_length: int, mtp_depth: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pieces of documents: starts, lengths, continues (not a document's first) and whole (not its last), each [P]."""
    sizes = np.diff(offsets)
    cuts = np.where(sizes > 0, np.maximum(1, -(-(sizes - 1) // sequence_length)), 0)
    document = np.repeat(np.arange(len(sizes)), cuts)
    number = np.arange(len(document)) - running_sum(cuts)[document]
    begins = number * sequence_length
    lengths = np.minimum(sequence_length + 1 + mtp_depth, sizes[document] - begins)
    return offsets[document] + begins, lengths, number > 0, number < cuts[document] - 1


def best_fit_decreasing(lengths: np.ndarray, capacity: int, make: Make = in_memory) -> np.ndarray:
    """A bin for each item, int64 [n], bins numbered from 0: longest items first, each into the fullest bin it fits in.

    lengths [n], each from 1 to `capacity`.
    """
    bins = make("bins", (len(lengths),), np.int64)
    place_best_fit(lengths, capacity, bins, 0, make)
    return bins


def place_best_fit(lengths: np.ndarray, capacity: int, bins: np.ndarray, opened: int, make: Make) -> int:
    """Fills in the bins of `best_fit_decreasing`, numbered from `opened`; returns the number after the last.

    Items of equal length are placed together and bins with equal space are interchangeable, so the work grows with the
    number of different lengths: a million documents take about a second.
    """
    by_space: dict[int, deque[np.ndarray]] = defaultdict(deque)  # free space -> bins, in arrays of some
    some = np.zeros(capacity + 1, dtype=bool)  # whether by_space has any

    def put(chosen: np.ndarray, space: int) -> None:
        if len(chosen):
            by_space[space].append(chosen)
            some[space] = True

    for length, items in longest_first(lengths, capacity, make):
        while len(items):
            space = length + int(some[length:].argmax())
            if some[space]:
                candidates = by_space[space].popleft()
            else:
                space = capacity
                candidates = np.arange(opened, opened - len(items) // -(capacity // length))
                opened += len(candidates)
            each = space // length  # once begun, a bin stays the fullest that fits
            placed = items[: len(candidates) * each]
            full, more = divmod(len(placed), each)
            used = full + (more > 0)
            bins[placed] = np.repeat(candidates[:used], each)[: len(placed)]
            put(candidates[:full], space - each * length)
            put(candidates[full:used], space - more * length)
            if used < len(candidates):
                by_space[space].appendleft(candidates[used:])
            some[space] = bool(by_space[space])
            items = items[len(placed) :]
    return opened


def longest_first(lengths: np.ndarray, capacity: int, make: Make) -> Iterator[tuple[int, np.ndarray]]:
    """Yields lengths, falling, with their items, rising; a length may repeat, with up to CHUNK items each time."""
    counts = np.zeros(capacity + 1, dtype=np.int64)
    for begin in range(0, len(lengths), CHUNK):
        counts += np.bincount(lengths[begin : begin + CHUNK], minlength=capacity + 1)
    order = make("order", (len(lengths),), np.int64)
    free = len(lengths) - np.cumsum(counts)  # where the next item of each length goes: after all longer ones
    for begin in range(0, len(lengths), CHUNK):
        chunk = lengths[begin : begin + CHUNK]
        falling = np.argsort(-chunk, kind="stable")
        order[take_next(free, chunk[falling])] = begin + falling
    end = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        begin, end = end, end + int(counts[length])
        for first in range(begin, end, CHUNK):
            yield length, order[first : min(first + CHUNK, end)]


def number_samples(wholes: Iterator[np.ndarray], bins: np.ndarray, sample: np.ndarray, make: Make) -> np.ndarray:
    """Fills in the sample of each piece [P]; returns PackedIndex.samples.

    Samples are numbered by their first piece and keep their pieces in corpus order, so that a share of the samples is a
    share of the corpus, not its longest documents. wholes: which pieces are whole, in chunks. bins: of the others.
    """
    of_bin = np.full(int(bins.max(initial=-1)) + 1, -1, dtype=np.int64)
    count = begin = tail = 0
    for whole in wholes:
        packed = np.flatnonzero(~whole)
        bin = bins[tail : tail + len(packed)]
        distinct, first = np.unique(bin, return_index=True)
        first = first[of_bin[distinct] < 0]
        opens = whole.copy()
        opens[packed[first]] = True
        number = count + np.cumsum(opens) - 1
        of_bin[bin[first]] = number[packed[first]]
        number[packed] = of_bin[bin]
        sample[begin : begin + len(whole)] = number
        count, begin, tail = count + int(opens.sum()), begin + len(whole), tail + len(packed)
    del of_bin  # frees the memory before as much is allocated again
    samples = make("samples", (count + 1,), np.int64)
    samples[:] = 0
    for begin in range(0, len(sample), CHUNK):
        numbers, pieces = np.unique(sample[begin : begin + CHUNK], return_counts=True)
        samples[numbers + 1] += pieces
    np.cumsum(samples, out=samples)
    return samples


def take_next(free: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Takes the next free position of each item's group, with a group's items adjacent: int64 [n]. Updates `free`.

    >>> free = np.array([0, 10, 20])
    >>> take_next(free, np.array([2, 2, 0])).tolist(), free.tolist()
    ([20, 21, 0], [1, 10, 22])
    """
    first, counts = runs(groups)
    taken = ranges(free[groups[first]], counts)
    free[groups[first]] += counts
    return taken


def runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Begins and lengths of runs of equal values, which are at least 0."""
    first = np.flatnonzero(np.diff(values, prepend=-1))
    return first, np.diff(np.append(first, len(values)))


def segment_start(continues: np.ndarray, positions: np.ndarray, mask_document_ends: bool) -> np.ndarray:
    """The first position of the sample that may predict into each piece, int32 [P]: 0, or the piece's first position.

    A piece that continues a document can't be predicted from another document's piece, and its first tokens are already
    targets in the document's previous sample. With `mask_document_ends` no piece is predicted from another one.
    """
    return np.where(continues | mask_document_ends, positions, 0).astype(np.int32)


def count_targets(
    index: PackedIndex,
    begin: int,
    end: int,
    sequence_length: int,
    mtp_depth: int,
    mask_document_ends: bool,
    loss_spans: np.ndarray | None,
) -> np.ndarray:
    """Valid targets of the samples begin .. end - 1 and each head, int64 [end - begin, P], without reading a token.

    Head k predicts position j from position j - 1 - k. In a piece over positions [a, e) with segment start c
    that is possible for max(a, c + 1 + k) <= j < e, if j is also at most T + k, the last position that it predicts at
    all. If `loss_spans` are given, only the positions in them count.
    """
    samples = index.samples[begin : end + 1]
    pieces = slice(samples[0], samples[-1])
    positions, starts = index.positions[pieces, None], index.starts[pieces, None]
    segment_starts = segment_start(index.continues[pieces], index.positions[pieces], mask_document_ends)
    head = np.arange(1 + mtp_depth)
    first = np.maximum(positions, segment_starts[:, None] + 1 + head)
    last = np.minimum(positions + index.lengths[pieces, None], sequence_length + 1 + head)
    valid = np.maximum(last - first, 0)
    if loss_spans is not None:
        in_file = starts - positions + first
        valid = count_in_spans(loss_spans, in_file + valid) - count_in_spans(loss_spans, in_file)
    totals = np.cumsum(valid, axis=0, dtype=np.int64)
    totals = np.concatenate([np.zeros((1, 1 + mtp_depth), dtype=np.int64), totals])
    counts: np.ndarray = np.diff(totals[samples - samples[0]], axis=0)
    return counts


def count_in_spans(spans: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """How many of 0 .. position - 1 are in the spans, int64 like `positions`. spans [2n]: begin, end, begin, end, …

    >>> count_in_spans(np.array([2, 4, 7, 8]), np.array([0, 3, 4, 6, 8, 9])).tolist()
    [0, 1, 2, 2, 3, 3]
    """
    passed = np.searchsorted(spans, positions, "right")  # an odd number of bounds: the position is inside a span
    whole = running_sum(spans[1::2] - spans[::2])[passed // 2]
    return np.where(passed % 2, whole + positions - spans[np.maximum(passed - 1, 0)], whole)


def ranges(firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Concatenated ranges: firsts[0], firsts[0] + 1, ... (counts[0] numbers), firsts[1], ...: int64 [counts.sum()]."""
    sums = running_sum(counts)
    return np.arange(sums[-1]) + np.repeat(firsts - sums[:-1], counts)


def running_sum(counts: np.ndarray) -> np.ndarray:
    """Cumulative sums with a leading 0: int64 [n + 1]."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
