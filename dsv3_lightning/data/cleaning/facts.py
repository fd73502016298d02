"""What the quality rules measure, computed once for all texts of a batch."""

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from dsv3_lightning.data.cleaning.words import Words, ngrams, words_of


class Facts:
    """Texts and what is known of them. Arrays have one value per text, [texts] float64, unless stated otherwise."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    @cached_property
    def words(self) -> Words:
        return words_of(self.texts)

    @cached_property
    def word_count(self) -> np.ndarray:
        return np.diff(self.words.bounds).astype(float)

    @cached_property
    def lines(self) -> list[list[str]]:
        """The lines of each text that hold more than white space, without white space around."""
        return [[line for line in map(str.strip, text.splitlines()) if line] for text in self.texts]

    @cached_property
    def paragraphs(self) -> list[list[str]]:
        """The parts of each text between empty lines."""
        return [[part for part in map(str.strip, text.split("\n\n")) if part] for text in self.texts]

    def share_of_lines(self, is_one: Callable[[str], bool]) -> np.ndarray:
        return np.array([ratio(sum(map(is_one, lines)), len(lines)) for lines in self.lines])

    def per_word(self, counts: Sequence[int]) -> np.ndarray:
        return np.array(counts, float) / np.maximum(self.word_count, 1)

    def sum_by_text(self, values: np.ndarray) -> np.ndarray:
        """Sums of values [words] over each text."""
        sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        return (sums[self.words.bounds[1:]] - sums[self.words.bounds[:-1]]).astype(float)

    def ngrams(self, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Hashes of the runs of `length` words, uint64 [n]; the text of each, and its first word, int64 [n]."""
        grams, bounds = ngrams(self.words, length)
        text = np.repeat(np.arange(len(self.texts)), np.diff(bounds))
        first = np.arange(len(grams)) - bounds[:-1][text] + self.words.bounds[:-1][text]
        return grams, text, first


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
