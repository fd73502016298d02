"""Measures for source code, as The Stack's models were filtered (arXiv 2107.03374 §2.1, arXiv 2305.06161 §3)."""

import numpy as np

from dsv3_lightning.data.cleaning.facts import Facts, ratio


def longest_line(facts: Facts) -> np.ndarray:
    return np.array([max(map(len, text.split("\n"))) for text in facts.texts], float)


def mean_line_chars(facts: Facts) -> np.ndarray:
    return np.array([len(text) / (text.count("\n") + 1) for text in facts.texts])


def alphanumeric_chars(facts: Facts) -> np.ndarray:
    inside = facts.sum_by_text(facts.words.lengths)
    return np.array([ratio(chars, len(text)) for chars, text in zip(inside, facts.texts)])
