"""Concatenation of documents, cut into samples of one length: the other way of packing. Imports no torch.

The documents of a group follow each other as one stream of tokens, which is cut with stride T like one long document
(packing.py). Nothing is padded but the end of a group, and a document may begin in one sample and end in another. With
`mask_document_ends` or isolated documents, what is left of a cut document can't see its begin.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from dsv3_lightning.data.batches import packing
from dsv3_lightning.data.batches.packing import Make, PackedIndex, allocate, fill_target_counts, in_memory, ranges


def concatenate(
    offsets: np.ndarray,
    sequence_length: int,
    mtp_depth: int,
    mask_document_ends: bool = False,
    loss_spans: np.ndarray | None = None,
    make: Make = in_memory,
    groups: Sequence[int] = (),
) -> PackedIndex:
    """An index of the stream's samples. The arguments are those of `packing.pack`."""
    offsets = np.asarray(offsets).astype(np.int64, copy=False)
    begins = stream_samples(offsets, sequence_length, groups)
    samples = make("samples", (len(begins) + 1,), np.int64)
    samples[0] = 0
    for first, last, (*_, row) in cut_in_chunks(offsets, begins, sequence_length, mtp_depth):
        counts = np.bincount(row, minlength=last - first)
        samples[first + 1 : last + 1] = samples[first] + np.cumsum(counts)
    index = allocate(samples, mtp_depth, make)
    for first, last, (starts, lengths, continues, row) in cut_in_chunks(offsets, begins, sequence_length, mtp_depth):
        of = slice(samples[first], samples[last])
        index.starts[of], index.lengths[of], index.continues[of] = starts, lengths, continues
        index.positions[of] = starts - begins[first:last, 0][row]
    fill_target_counts(index, sequence_length, mtp_depth, mask_document_ends, loss_spans)
    return index


def stream_samples(offsets: np.ndarray, sequence_length: int, groups: Sequence[int]) -> np.ndarray:
    """The first token of each sample and the end of its group, int64 [samples, 2]."""
    parts = [np.empty((0, 2), dtype=np.int64)]
    for first, last in pairwise([0, *groups, len(offsets) - 1]):
        begin, end = int(offsets[first]), int(offsets[last])
        last_start = max(end - 1, begin + (end > begin))  # a group's last token alone has been predicted already
        starts = np.arange(begin, last_start, sequence_length)
        parts.append(np.stack([starts, np.full_like(starts, end)], 1))
    return np.concatenate(parts)


def cut_in_chunks(
    offsets: np.ndarray, begins: np.ndarray, sequence_length: int, mtp_depth: int
) -> Iterator[tuple[int, int, tuple[np.ndarray, ...]]]:
    """Yields ranges of samples with their pieces: starts, lengths, continues, and each piece's sample of the range."""
    documents, first = len(offsets) - 1, 0
    while first < len(begins):
        last = min(first + max(1, 16 * packing.CHUNK // sequence_length), len(begins))
        start_S, end_S = begins[first:last, 0], begins[first:last, 1]
        end_S = np.minimum(start_S + sequence_length + 1 + mtp_depth, end_S)
        low = int(np.searchsorted(offsets, start_S[0], "right")) - 1
        high = min(int(np.searchsorted(offsets, end_S[-1], "left")), documents)
        near = offsets[low : high + 1]
        near = near[np.append(np.diff(near) > 0, True)]  # without empty documents
        from_S = np.searchsorted(near, start_S, "right") - 1
        counts = np.searchsorted(near, end_S, "left") - from_S
        document, row = ranges(from_S, counts), np.repeat(np.arange(last - first), counts)
        starts = np.maximum(near[document], start_S[row])
        lengths = np.minimum(near[document + 1], end_S[row]) - starts
        yield first, last, (starts, lengths, starts > near[document], row)
        first = last
