"""The measures of FineWeb's own filters (arXiv 2406.17557 §3.6); that of repeated lines is Gopher's."""

import numpy as np

from dsv3_lightning.data.cleaning.facts import Facts

ENDS = (".", "'", '"', "!", "?", "。", "！", "？", "…", "”", "’", "」", "；", "：")
SHORT = 30  # characters


def punctuated_lines(facts: Facts) -> np.ndarray:
    return facts.share_of_lines(lambda line: line.endswith(ENDS))


def short_lines(facts: Facts) -> np.ndarray:
    return facts.share_of_lines(lambda line: len(line) <= SHORT)


def newlines_per_word(facts: Facts) -> np.ndarray:
    return facts.per_word([text.count("\n") for text in facts.texts])
