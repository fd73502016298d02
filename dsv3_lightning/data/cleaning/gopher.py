"""The measures of Gopher's quality rules and repetition rules (arXiv 2112.11446, table A1), over a batch of texts.

Words are those of words.py, so that a Chinese character counts as one; symbols are no words.
"""

from collections.abc import Sequence

import numpy as np

from dsv3_lightning.data.cleaning.facts import Facts, ratio
from dsv3_lightning.data.cleaning.words import mixed, words_of

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
BULLETS = ("•", "‣", "▪", "●", "○", "◦", "*", "-", "–", "·")
ELLIPSES = ("...", "…", ". . .")


def words(facts: Facts) -> np.ndarray:
    return facts.word_count


def mean_word_chars(facts: Facts) -> np.ndarray:
    return facts.sum_by_text(facts.words.lengths) / np.maximum(facts.word_count, 1)


def hashes_per_word(facts: Facts) -> np.ndarray:
    return facts.per_word([text.count("#") for text in facts.texts])


def ellipses_per_word(facts: Facts) -> np.ndarray:
    return facts.per_word([sum(map(text.count, ELLIPSES)) for text in facts.texts])


def bullet_lines(facts: Facts) -> np.ndarray:
    return facts.share_of_lines(lambda line: line.startswith(BULLETS))


def ellipsis_lines(facts: Facts) -> np.ndarray:
    return facts.share_of_lines(lambda line: line.endswith(ELLIPSES))


def words_with_letters(facts: Facts) -> np.ndarray:
    return facts.sum_by_text(facts.words.letters) / np.maximum(facts.word_count, 1)


def stop_words(facts: Facts) -> np.ndarray:
    """How many different English stop words a text holds."""
    wanted = words_of(STOP_WORDS).hashes
    return sum((facts.sum_by_text(facts.words.hashes == one) > 0).astype(float) for one in wanted)  # type: ignore[return-value]


def duplicate_lines(facts: Facts) -> np.ndarray:
    return repeated(facts.lines)[0]


def duplicate_line_chars(facts: Facts) -> np.ndarray:
    return repeated(facts.lines)[1]


def duplicate_paragraphs(facts: Facts) -> np.ndarray:
    return repeated(facts.paragraphs)[0]


def duplicate_paragraph_chars(facts: Facts) -> np.ndarray:
    return repeated(facts.paragraphs)[1]


def repeated(parts: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """The share of each text's parts, and of their characters, that an earlier part of the text equals."""
    of_parts, of_chars = [], []
    for found in parts:
        chars = sum(map(len, found))
        once = set(found)
        of_parts.append(ratio(len(found) - len(once), len(found)))
        of_chars.append(ratio(chars - sum(map(len, once)), chars))
    return np.array(of_parts), np.array(of_chars)


def top_ngram_chars(facts: Facts, length: int) -> np.ndarray:
    """The share of a text's characters in words that its most frequent run of `length` words covers, if it repeats."""
    order, text, first, begins = grouped(facts, length)
    if not len(order):
        return np.zeros(len(facts.texts))
    counts = np.diff(np.append(begins, len(order)))
    heads = order[begins]
    chars = counts * run_chars(facts, first[heads], length)
    rank = np.lexsort((chars, counts, text[heads]))  # by text, then count: the last of a text is its most frequent run
    last = rank[np.append(np.diff(text[heads][rank]) > 0, True)]
    found = np.zeros(len(facts.texts))
    found[text[heads][last]] = np.where(counts[last] > 1, chars[last], 0)
    return found / np.maximum(facts.sum_by_text(facts.words.lengths), 1)


def duplicate_ngram_chars(facts: Facts, length: int) -> np.ndarray:
    """The share of a text's characters in words inside a run of `length` words that occurred before in it."""
    order, _, first, begins = grouped(facts, length)
    again = np.ones(len(order), bool)
    again[begins] = False
    starts = np.zeros(len(facts.words.hashes) + length, np.int64)
    covering = first[order[again]]
    np.add.at(starts, covering, 1)
    np.add.at(starts, covering + length, -1)
    covered = np.cumsum(starts)[: len(facts.words.hashes)] > 0
    chars = facts.sum_by_text(np.where(covered, facts.words.lengths, 0))
    return chars / np.maximum(facts.sum_by_text(facts.words.lengths), 1)


def grouped(facts: Facts, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Runs of words with equal ones of a text next to each other, in their order in the text.

    Returns order [n] of the runs, the text and first word of each run before ordering [n], and where groups begin in
    `order`.
    """
    grams, text, first = facts.ngrams(length)
    keys = grams ^ mixed(text.astype(np.uint64) + np.uint64(1))
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    begins = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])) if len(order) else np.empty(0, np.int64)
    return order, text, first, begins


def run_chars(facts: Facts, first: np.ndarray, length: int) -> np.ndarray:
    sums = np.concatenate([[0], np.cumsum(facts.words.lengths, dtype=np.int64)])
    return sums[first + length] - sums[first]
