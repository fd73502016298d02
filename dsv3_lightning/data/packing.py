"""Documents to fixed-length samples, as an index: the tokens themselves stay where they are. Imports no torch.

T = sequence_length, D = mtp_depth. A sample has T + 1 + D places: T inputs, their next tokens, and D more that only the
MTP modules predict. Every token of a document but its first is the main head's target exactly once:

- A document of more than T + 1 tokens is cut with stride T. Each cut but the last fills a sample of its own.
- Last cuts and whole documents are packed best-fit-decreasing into T + 1 places (arXiv 2404.10830), without truncation.
"""

from collections import defaultdict, deque
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PackedIndex:
    """S samples of together P pieces, in the order of the corpus.

    samples [S + 1] int64: sample s consists of the pieces samples[s] .. samples[s + 1] - 1.
    starts, lengths [P] int64: which tokens of the file. positions [P] int64: the place of the first in its sample.
    continues [P] bool: the piece begins inside a document; the end of the piece before it, elsewhere, already predicted
        its first token.
    """

    samples: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    positions: np.ndarray
    continues: np.ndarray

    def __len__(self) -> int:
        return len(self.samples) - 1


def pack(offsets: np.ndarray, sequence_length: int, mtp_depth: int) -> PackedIndex:
    """The samples of the documents that begin at offsets [documents + 1]. Deterministic."""
    starts, lengths, continues, whole = cut_documents(offsets, sequence_length, mtp_depth)
    sample = np.empty(len(starts), dtype=np.int64)
    sample[~whole] = best_fit_decreasing(lengths[~whole], sequence_length + 1)
    sample[whole] = np.arange(whole.sum()) + sample[~whole].max(initial=-1) + 1
    # Samples are numbered by their first piece, and keep their pieces in the corpus' order: a share of them is then a
    # share of the corpus, not its longest documents.
    _, first, sample = np.unique(sample, return_index=True, return_inverse=True)
    sample = np.argsort(np.argsort(first))[sample]
    order = np.argsort(sample, kind="stable")
    samples = running_sum(np.bincount(sample, minlength=len(first)))
    ends = running_sum(lengths[order])
    positions = ends[:-1] - ends[samples[sample[order]]]
    return PackedIndex(samples, starts[order], lengths[order], positions, continues[order])


def cut_documents(
    offsets: np.ndarray, sequence_length: int, mtp_depth: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pieces as starts, lengths, continues (not a document's first) and whole (not its last), each [P]."""
    offsets = np.asarray(offsets, dtype=np.int64)
    sizes = np.diff(offsets)
    cuts = np.where(sizes > 0, np.maximum(1, -(-(sizes - 1) // sequence_length)), 0)
    document = np.repeat(np.arange(len(sizes)), cuts)
    number = np.arange(len(document)) - running_sum(cuts)[document]
    begins = number * sequence_length
    lengths = np.minimum(sequence_length + 1 + mtp_depth, sizes[document] - begins)
    return offsets[document] + begins, lengths, number > 0, number < cuts[document] - 1


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """A bin for each item, int64 [n], bins numbered from 0: longest items first, each into the fullest bin it fits in.

    Items of one length are placed together, and bins with equal space are alike, so the work grows with the number of
    different lengths: a million documents take about a second. lengths [n], each from 1 to `capacity`.
    """
    bins = np.empty(len(lengths), dtype=np.int64)
    by_space: dict[int, deque[np.ndarray]] = defaultdict(deque)  # free space -> bins, in arrays of some
    some = np.zeros(capacity + 1, dtype=bool)  # whether by_space has any
    opened = 0

    def put(chosen: np.ndarray, space: int) -> None:
        if len(chosen):
            by_space[space].append(chosen)
            some[space] = True

    order = np.argsort(-lengths, kind="stable")
    for items in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1):
        length = int(lengths[items[0]]) if len(items) else capacity
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
            bins[placed] = np.repeat(candidates, each)[: len(placed)]
            full, more = divmod(len(placed), each)
            put(candidates[:full], space - each * length)
            put(candidates[full : full + (more > 0)], space - more * length)
            unused = candidates[full + (more > 0) :]
            if len(unused):
                by_space[space].appendleft(unused)
            some[space] = bool(by_space[space])
            items = items[len(placed) :]
    return bins


def running_sum(counts: np.ndarray) -> np.ndarray:
    """0, then the sum of the first 1, 2, ... counts: int64 [n + 1]."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
