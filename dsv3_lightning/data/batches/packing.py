"""Documents to fixed-length samples, as an index: the tokens themselves stay where they are. Imports no torch.

T = sequence_length. A sample has S = T + 1 + mtp_depth positions: T inputs, their next tokens, and mtp_depth more that
only the MTP modules predict. Every token of a document but its first is the main head's target exactly once:

- A document of more than T + 1 tokens is cut with stride T. Each cut but the last fills a sample of its own.
- Last cuts and whole documents are packed best-fit-decreasing into T + 1 places (arXiv 2404.10830), without truncation.

What grows with the number of documents goes into arrays that the caller makes, which may be files: for a billion
documents it is tens of gigabytes. Memory holds one or two numbers per sample, and a chunk of pieces.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

CHUNK = 1 << 16  # pieces at a time

Make = Callable[[str, tuple[int, ...], Any], np.ndarray]  # name, shape and dtype to an array


@dataclass(frozen=True)
class PackedIndex:
    """Samples made of pieces of documents, in the order of the corpus.

    samples [samples + 1] int64: sample s consists of the pieces samples[s] .. samples[s + 1] - 1.
    starts, lengths [pieces] int64: which tokens of the file. positions [pieces] int64: the first one's in its sample.
    continues [pieces] bool: the piece begins inside a document, and the end of the piece before it, elsewhere, has
        already predicted its first token.
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


def in_memory(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.empty(shape, dtype)


def pack(
    offsets: np.ndarray,
    sequence_length: int,
    mtp_depth: int,
    mask_document_ends: bool = False,
    answers: np.ndarray | None = None,
    make: Make = in_memory,
) -> PackedIndex:
    """The samples of the documents that begin at offsets [documents + 1]. Deterministic.

    mask_document_ends, answers: decide which targets are valid (see `barriers`, TokenFile).
    make: is also asked for arrays that the index doesn't have; they are done with in the end.
    """
    offsets = np.asarray(offsets).astype(np.int64, copy=False)
    tails, pieces, documents = make("tails", (len(offsets) - 1,), np.int32), 0, 0
    for _, lengths, _, whole in cut_in_chunks(offsets, sequence_length, mtp_depth):
        ends = lengths[~whole]
        tails[documents : documents + len(ends)] = ends
        pieces, documents = pieces + len(lengths), documents + len(ends)
    bins = best_fit_decreasing(tails[:documents], sequence_length + 1, make)

    cuts = cut_in_chunks(offsets, sequence_length, mtp_depth)
    sample = make("sample", (pieces,), np.int64)
    samples = number_samples((whole for *_, whole in cuts), bins, sample, make)

    index = PackedIndex(
        samples,
        starts=make("starts", (pieces,), np.int64),
        lengths=make("lengths", (pieces,), np.int64),
        positions=make("positions", (pieces,), np.int64),
        continues=make("continues", (pieces,), np.bool_),
        target_counts=make("target_counts", (len(samples) - 1, 1 + mtp_depth), np.int64),
    )
    free, filled = samples[:-1].copy(), np.zeros(len(index), dtype=np.int32)  # the next piece's number, and place
    begin = 0
    for starts, lengths, continues, _ in cut_in_chunks(offsets, sequence_length, mtp_depth):
        end = begin + len(starts)
        order = np.argsort(sample[begin:end], kind="stable")
        of, sizes, begin = sample[begin:end][order], lengths[order], end
        places = take_places(free, of)
        index.starts[places], index.lengths[places], index.continues[places] = starts[order], sizes, continues[order]
        first, count = runs(of)
        sums = running_sum(sizes)
        index.positions[places] = sums[:-1] + np.repeat(filled[of[first]] - sums[first], count)
        filled[of[first]] += np.diff(np.append(sums[first], sums[-1])).astype(np.int32)

    begin = 0
    while begin < len(index):
        end = max(begin + 1, int(np.searchsorted(samples, samples[begin] + CHUNK, "right")) - 1)
        counts = count_targets(index, begin, end, sequence_length, mtp_depth, mask_document_ends, answers)
        index.target_counts[begin:end] = counts
        begin = end
    return index


def cut_in_chunks(
    offsets: np.ndarray, sequence_length: int, mtp_depth: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """`cut_documents`, of so many documents at a time that they have some CHUNK pieces."""
    begin, documents = 0, len(offsets) - 1
    while begin < documents:
        far = int(np.searchsorted(offsets, offsets[begin] + CHUNK * sequence_length, "right")) - 1
        end = max(begin + 1, min(begin + CHUNK, far))
        yield cut_documents(offsets[begin : end + 1], sequence_length, mtp_depth)
        begin = end


def cut_documents(
    offsets: np.ndarray, sequence_length: int, mtp_depth: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pieces as starts, lengths, continues (not a document's first) and whole (not its last), each [P]."""
    sizes = np.diff(offsets)
    cuts = np.where(sizes > 0, np.maximum(1, -(-(sizes - 1) // sequence_length)), 0)
    document = np.repeat(np.arange(len(sizes)), cuts)
    number = np.arange(len(document)) - running_sum(cuts)[document]
    begins = number * sequence_length
    lengths = np.minimum(sequence_length + 1 + mtp_depth, sizes[document] - begins)
    return offsets[document] + begins, lengths, number > 0, number < cuts[document] - 1


def best_fit_decreasing(lengths: np.ndarray, capacity: int, make: Make = in_memory) -> np.ndarray:
    """A bin for each item, int64 [n], bins numbered from 0: longest items first, each into the fullest bin it fits in.

    Items of one length are placed together, and bins with equal space are alike, so the work grows with the number of
    different lengths: a million documents take about a second. lengths [n], each from 1 to `capacity`.
    """
    bins = make("bins", (len(lengths),), np.int64)
    by_space: dict[int, deque[np.ndarray]] = defaultdict(deque)  # free space -> bins, in arrays of some
    some = np.zeros(capacity + 1, dtype=bool)  # whether by_space has any
    opened = 0

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
    return bins


def longest_first(lengths: np.ndarray, capacity: int, make: Make) -> Iterator[tuple[int, np.ndarray]]:
    """Lengths, falling, and items that have them, rising: one length may come several times, with a CHUNK each."""
    counts = np.zeros(capacity + 1, dtype=np.int64)
    for begin in range(0, len(lengths), CHUNK):
        counts += np.bincount(lengths[begin : begin + CHUNK], minlength=capacity + 1)
    order = make("order", (len(lengths),), np.int64)
    free = len(lengths) - np.cumsum(counts)  # where the next item of each length goes: after all longer ones
    for begin in range(0, len(lengths), CHUNK):
        chunk = lengths[begin : begin + CHUNK]
        falling = np.argsort(-chunk, kind="stable")
        order[take_places(free, chunk[falling])] = begin + falling
    end = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        begin, end = end, end + int(counts[length])
        for first in range(begin, end, CHUNK):
            yield length, order[first : min(first + CHUNK, end)]


def number_samples(wholes: Iterator[np.ndarray], bins: np.ndarray, sample: np.ndarray, make: Make) -> np.ndarray:
    """Fills in the sample of each piece [P]; returns PackedIndex.samples.

    Samples are numbered by their first piece, and keep their pieces in the corpus' order: a share of them is then a
    share of the corpus, not its longest documents. wholes: of pieces, in chunks. bins: of those that aren't whole.
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
    del of_bin  # before as much is needed for another purpose
    samples = make("samples", (count + 1,), np.int64)
    samples[:] = 0
    for begin in range(0, len(sample), CHUNK):
        numbers, pieces = np.unique(sample[begin : begin + CHUNK], return_counts=True)
        samples[numbers + 1] += pieces
    np.cumsum(samples, out=samples)
    return samples


def take_places(free: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The next free place of each item's group, where a group's items stand together: int64 [n]. They are then taken.

    >>> free = np.array([0, 10, 20])
    >>> take_places(free, np.array([2, 2, 0])).tolist(), free.tolist()
    ([20, 21, 0], [1, 10, 22])
    """
    first, counts = runs(groups)
    places = stretch(free[groups[first]], counts)
    free[groups[first]] += counts
    return places


def runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where stretches of equal values (from 0 on) begin, and how long they are."""
    first = np.flatnonzero(np.diff(values, prepend=-1))
    return first, np.diff(np.append(first, len(values)))


def barriers(continues: np.ndarray, positions: np.ndarray, mask_document_ends: bool) -> np.ndarray:
    """The first place of the sample that may predict into each piece, int32 [P]: 0, or the piece's own first place.

    A piece that continues a document can't be foreseen from another piece, and the sample before it, in the document,
    has its first tokens as targets already. With `mask_document_ends` no piece is predicted from another one.
    """
    return np.where(continues | mask_document_ends, positions, 0).astype(np.int32)


def count_targets(
    index: PackedIndex,
    begin: int,
    end: int,
    sequence_length: int,
    mtp_depth: int,
    mask_document_ends: bool,
    answers: np.ndarray | None,
) -> np.ndarray:
    """Valid targets of the samples begin .. end - 1 and each head, int64 [end - begin, P], without reading a token.

    Head k predicts place j from place j - 1 - k. In a piece over places [a, e) with barrier c that is possible for
    max(a, c + 1 + k) <= j < e, if j is also at most T + k, the last place that it predicts at all. Of those places
    the ones that `answers` hold count, or all.
    """
    samples = index.samples[begin : end + 1]
    pieces = slice(samples[0], samples[-1])
    positions, starts = index.positions[pieces, None], index.starts[pieces, None]
    barrier = barriers(index.continues[pieces], index.positions[pieces], mask_document_ends)
    head = np.arange(1 + mtp_depth)
    first = np.maximum(positions, barrier[:, None] + 1 + head)
    last = np.minimum(positions + index.lengths[pieces, None], sequence_length + 1 + head)
    valid = np.maximum(last - first, 0)
    if answers is not None:
        places = starts - positions + first  # in the file
        valid = inside(answers, places + valid) - inside(answers, places)
    totals = np.cumsum(valid, axis=0, dtype=np.int64)
    totals = np.concatenate([np.zeros((1, 1 + mtp_depth), dtype=np.int64), totals])
    counts: np.ndarray = np.diff(totals[samples - samples[0]], axis=0)
    return counts


def inside(stretches: np.ndarray, places: np.ndarray) -> np.ndarray:
    """How many of 0 .. place - 1 the stretches hold, int64 like `places`. stretches [2n]: begin, end, begin, end, …

    >>> inside(np.array([2, 4, 7, 8]), np.array([0, 3, 4, 6, 8, 9])).tolist()
    [0, 1, 2, 2, 3, 3]
    """
    passed = np.searchsorted(stretches, places, "right")  # an odd number of bounds: the place is within a stretch
    whole = running_sum(stretches[1::2] - stretches[::2])[passed // 2]
    return np.where(passed % 2, whole + places - stretches[np.maximum(passed - 1, 0)], whole)


def stretch(firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """firsts[0], firsts[0] + 1, ... (counts[0] numbers), then firsts[1], firsts[1] + 1, ...: int64 [counts.sum()]."""
    sums = running_sum(counts)
    return np.arange(sums[-1]) + np.repeat(firsts - sums[:-1], counts)


def running_sum(counts: np.ndarray) -> np.ndarray:
    """0, then the sum of the first 1, 2, ... counts: int64 [n + 1]."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
