"""Exact and near duplicates over all documents: which copy stays, by hashes and signatures alone.

Documents are numbered in the order of their tasks and of their places in a task. Of duplicates, direct or through
others, the one with the lowest number is kept, so the result depends on nothing else.
"""

import hashlib
import unicodedata
from collections.abc import Callable

import numpy as np

DIGEST = 16  # bytes


def digest(text: str) -> bytes:
    """A hash of the text that ignores white space: DIGEST bytes."""
    same = " ".join(unicodedata.normalize("NFC", text).split())
    return hashlib.blake2b(same.encode("utf-8", "surrogatepass"), digest_size=DIGEST).digest()


def repeated(digests: np.ndarray) -> np.ndarray:
    """Which documents equal an earlier one: bool [documents]. digests: uint64 [documents, 2]."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable, so that equal ones stay in their order
    ordered = digests[order]
    again = np.zeros(len(order), bool)
    again[order[1:]] = (ordered[1:] == ordered[:-1]).all(1)
    return again


def similar(keys_of: Callable[[int], np.ndarray], buckets: int) -> np.ndarray:
    """Which documents share a bucket with an earlier one, directly or through others: bool [documents].

    keys_of: bucket to the documents' keys, uint64 [documents], 0 for those that match nothing. Buckets are taken one
    after the other; memory is about 50 bytes for each document.
    """
    lowest: np.ndarray | None = None
    for bucket in range(buckets):
        keys = keys_of(bucket)
        if lowest is None:
            lowest = np.arange(len(keys))
        filled = np.flatnonzero(keys)
        order = filled[np.argsort(keys[filled], kind="stable")]
        equal = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
        lowest = joined(lowest, order[equal], order[equal + 1])
    assert lowest is not None
    return lowest != np.arange(len(lowest))


def joined(lowest: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Connected components after adding edges. lowest, result: the lowest number of each one's component, int64 [n].

    Union-find over whole arrays: of the components that an edge connects, the root of the higher one is hooked to the
    lower root, then all paths are shortened, until no edge connects two.
    """
    lowest = lowest.copy()
    while True:
        a, b = lowest[left], lowest[right]
        apart = a != b
        if not apart.any():
            return lowest
        left, right, a, b = left[apart], right[apart], a[apart], b[apart]
        np.minimum.at(lowest, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(shorter := lowest[lowest], lowest):
            lowest = shorter
