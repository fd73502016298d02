"""Words of many texts at once, as 64-bit hashes: the units of MinHash shingles and of n-grams for decontamination.

A word is a run of letters, digits and marks; each Chinese character and each kana is a word of its own; everything else
separates words. Texts that differ only in case, white space, punctuation, full width or the diacritics of precomposed
letters have the same words.
"""

import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

VERSION = f"1, Unicode {unicodedata.unidata_version}"  # of the hashes' values
ALONE = 1 << 31  # marks characters that are words of their own
BASE = 0x9E3779B97F4A7C15  # odd, so that powers of it have inverses modulo 2^64
MIX = 0xBF58476D1CE4E5B9
MIX2 = 0x94D049BB133111EB


@dataclass(frozen=True)
class Words:
    """hashes: uint64 [words]. bounds: int64 [texts + 1]: hashes[bounds[i]:bounds[i + 1]] are those of text i.

    folded: uint32 [characters of all texts]: 0 for separators. positions: int64 [words]: where each word begins there.
    """

    hashes: np.ndarray
    bounds: np.ndarray
    folded: np.ndarray
    positions: np.ndarray

    @cached_property
    def alone(self) -> np.ndarray:
        """Which words are single Chinese characters or kana: bool [words]."""
        return self.folded[self.positions] >= ALONE

    @cached_property
    def lengths(self) -> np.ndarray:
        """Characters of each word: int64 [words]."""
        inside = (self.folded != 0).astype(np.int64)
        return np.add.reduceat(inside, self.positions) if len(self.positions) else self.positions

    @cached_property
    def letters(self) -> np.ndarray:
        """Which words hold a letter: bool [words]."""
        if not len(self.positions):
            return np.empty(0, bool)
        return np.maximum.reduceat(self.folded, self.positions) > ord("9")


def words_of(texts: Sequence[str]) -> Words:
    """The words of the texts. Memory: about 40 bytes for each character."""
    joined = "\n".join(texts)
    codes = np.frombuffer(joined.encode("utf-32-le", "replace"), np.uint32)
    folded = fold_table()[codes]
    alone = folded >= ALONE
    inside = folded != 0
    starts = inside.copy()
    starts[1:] &= ~inside[:-1] | alone[1:] | alone[:-1]
    positions = np.flatnonzero(starts)
    ends_of_texts = np.cumsum([len(text) + 1 for text in texts], dtype=np.int64)
    bounds = np.concatenate([[0], np.searchsorted(positions, ends_of_texts)]).astype(np.int64)
    if not len(positions):
        return Words(np.empty(0, np.uint64), bounds, folded, positions)
    powers, inverses = powers_of_base(len(codes))
    sums = np.add.reduceat(folded.astype(np.uint64) * powers[: len(codes)], positions)  # separators add nothing
    return Words(mixed(sums * inverses[positions]), bounds, folded, positions)


def ngrams(words: Words, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of all runs of `length` words within a text: uint64 [n], and bounds int64 [texts + 1] as in Words."""
    hashes, bounds = words.hashes, words.bounds
    counts = np.maximum(np.diff(bounds) - (length - 1), 0)
    new_bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    if not new_bounds[-1]:
        return np.empty(0, np.uint64), new_bounds
    total = len(hashes) - (length - 1)
    found = hashes[:total].copy()
    for offset in range(1, length):
        found *= np.uint64(BASE)
        found += hashes[offset : offset + total]
    inside = np.ones(total, bool)
    for back in range(1, length):  # runs that would cross the end of a text
        crossing = bounds[1:-1] - back
        inside[crossing[(crossing >= 0) & (crossing < total)]] = False
    return mixed(found[inside]), new_bounds


def mixed(hashes: np.ndarray) -> np.ndarray:
    """Spreads every bit over all others (the finalizer of SplitMix64), in place."""
    hashes ^= hashes >> np.uint64(30)
    hashes *= np.uint64(MIX)
    hashes ^= hashes >> np.uint64(27)
    hashes *= np.uint64(MIX2)
    hashes ^= hashes >> np.uint64(31)
    return hashes


POWERS: list[np.ndarray] = [
    np.ones(1, np.uint64),
    np.ones(1, np.uint64),
]  # of BASE and of its inverse, as far as needed


def powers_of_base(count: int) -> tuple[np.ndarray, np.ndarray]:
    """BASE^i and BASE^-i modulo 2^64 for i < `count` or more."""
    while len(POWERS[0]) < count:
        size = len(POWERS[0])
        for which, base in enumerate((BASE, pow(BASE, -1, 1 << 64))):
            factor = np.uint64(pow(base, size, 1 << 64))
            POWERS[which] = np.concatenate([POWERS[which], POWERS[which] * factor])
    return POWERS[0], POWERS[1]


@cache
def fold_table() -> np.ndarray:
    """uint32 by code point: 0 for what separates words, else the folded letter or digit, with ALONE for those alone."""
    table = np.zeros(sys.maxunicode + 1, np.uint32)
    for code in (*range(0x3400), *range(0xA000, 0x1F000)):
        if 0xAC00 <= code <= 0xD7A3:  # Hangul: written with spaces, and NFKD would take its syllables apart
            table[code] = code
            continue
        folded = unicodedata.normalize("NFKD", chr(code)) if code >= 0x80 else chr(code)
        lower = folded[0].lower()[0]
        if lower.isalnum() or unicodedata.category(lower).startswith("M"):  # marks are vowels in Hindi and Thai
            table[code] = ord(lower)
    for begin, end in ((0x3041, 0x3097), (0x30A1, 0x30FB), (0x31F0, 0x3200)):  # kana
        table[begin:end] |= ALONE
    for begin, end in ((0x3400, 0x4DC0), (0x4E00, 0xA000), (0x20000, 0x32000)):  # ideographs
        table[begin:end] = np.arange(begin, end) | ALONE
    compatible = table[0xF900:0xFB00]
    compatible[(compatible >= 0x3400) & (compatible < 0xA000)] |= ALONE
    return table
