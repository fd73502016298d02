"""MinHash signatures of word n-grams, for near duplicates (FineWeb §3: 112 hashes of word 5-grams, in 14 buckets of 8).

The share of equal values in two signatures estimates the Jaccard similarity of the two sets of n-grams. Two documents
are duplicates if all values of one bucket are equal, with the probability 1 - (1 - s^rows)^buckets at similarity s.
"""

import numpy as np

from dsv3_lightning.data.cleaning import words

VERSION = f"1 on words {words.VERSION}"  # signatures of other versions never match
EMPTY = np.uint32(0xFFFFFFFF)  # every value of a text without n-grams, which matches nothing
BLOCK = 1 << 15  # n-grams that are hashed at a time, in the processor's cache


def signatures(grams: np.ndarray, bounds: np.ndarray, count: int) -> np.ndarray:
    """The least of each of `count` hash functions over each text's n-grams: uint32 [texts, count].

    grams: uint64 [n]; bounds: int64 [texts + 1], as `words.ngrams` returns them. The functions are
    (a·x + b) mod 2^32 of the n-gram's upper 32 bits, with odd a.
    """
    found = np.full((len(bounds) - 1, count), EMPTY, np.uint32)
    factors, terms = functions(count)
    values = (grams >> np.uint64(32)).astype(np.uint32)
    for begin in range(0, len(values), BLOCK):
        block = values[begin : begin + BLOCK]
        first = int(np.searchsorted(bounds, begin, "right")) - 1
        last = int(np.searchsorted(bounds, begin + len(block), "left"))
        starts = np.maximum(bounds[first:last] - begin, 0)
        filled = bounds[first + 1 : last + 1] > bounds[first:last]  # texts without n-grams have no place in reduceat
        rows, starts = np.flatnonzero(filled) + first, starts[filled]
        hashed = np.empty_like(block)
        least = np.empty((count, len(starts)), np.uint32)
        for number in range(count):
            np.multiply(block, factors[number], out=hashed)
            np.add(hashed, terms[number], out=hashed)
            np.minimum.reduceat(hashed, starts, out=least[number])
        found[rows] = np.minimum(found[rows], least.T)
    return found


def functions(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The factors and terms of the hash functions, uint32 [count] each, the same in every process."""
    state = words.mixed(np.arange(1, 2 * count + 1, dtype=np.uint64) * np.uint64(words.BASE))
    values = (state >> np.uint64(32)).astype(np.uint32)
    return values[:count] | np.uint32(1), values[count:]


def bucket_keys(signatures: np.ndarray, bucket: int, rows: int) -> np.ndarray:
    """One 64-bit key for the values of a bucket: uint64 [texts]. 0 for texts without n-grams."""
    part = signatures[:, bucket * rows : (bucket + 1) * rows]
    keys = np.zeros(len(part), np.uint64)
    for column in range(rows):
        keys = words.mixed(keys * np.uint64(words.BASE) + part[:, column].astype(np.uint64) + np.uint64(1))
    keys[(part == EMPTY).all(1)] = 0
    return keys


def match_probability(similarity: float, buckets: int, rows: int) -> float:
    """The probability that two documents of this similarity share a bucket.

    >>> [round(match_probability(s, 14, 8), 3) for s in (0.7, 0.75, 0.8, 0.85)]
    [0.565, 0.772, 0.924, 0.988]
    """
    return 1 - (1 - similarity**rows) ** buckets
