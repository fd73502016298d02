"""Quality rules by name: a measure of a text, and the side of the threshold that drops it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from dsv3_lightning.data.cleaning import c4, code, fineweb, gopher
from dsv3_lightning.data.cleaning.facts import Facts

Measure = Callable[[Facts], np.ndarray]

# In this order: the first rule that a text breaks is the reason why it is dropped.
RULES: dict[str, Measure] = {
    "min_words": gopher.words,
    "max_words": gopher.words,
    "min_mean_word_chars": gopher.mean_word_chars,
    "max_mean_word_chars": gopher.mean_word_chars,
    "max_hashes_per_word": gopher.hashes_per_word,
    "max_ellipses_per_word": gopher.ellipses_per_word,
    "max_bullet_lines": gopher.bullet_lines,
    "max_ellipsis_lines": gopher.ellipsis_lines,
    "min_words_with_letters": gopher.words_with_letters,
    "min_stop_words": gopher.stop_words,
    "max_duplicate_lines": gopher.duplicate_lines,
    "max_duplicate_line_chars": gopher.duplicate_line_chars,
    "max_duplicate_paragraphs": gopher.duplicate_paragraphs,
    "max_duplicate_paragraph_chars": gopher.duplicate_paragraph_chars,
    **{f"max_top_{n}gram_chars": partial(gopher.top_ngram_chars, length=n) for n in (2, 3, 4)},
    **{f"max_duplicate_{n}gram_chars": partial(gopher.duplicate_ngram_chars, length=n) for n in range(5, 11)},
    "max_lorem_ipsum": c4.lorem_ipsum,
    "max_curly_brackets": c4.curly_brackets,
    "min_sentences": c4.sentences,
    "min_punctuated_lines": fineweb.punctuated_lines,
    "max_short_lines": fineweb.short_lines,
    "max_newlines_per_word": fineweb.newlines_per_word,
    "max_line_chars": code.longest_line,
    "max_mean_line_chars": code.mean_line_chars,
    "min_alphanumeric_chars": code.alphanumeric_chars,
}


def judge(texts: Sequence[str], rules: Mapping[str, float | bool | None]) -> list[str | None]:
    """The first rule that each text breaks, or None. rules: thresholds by name; those of lines are not judged here."""
    reasons: list[str | None] = [None] * len(texts)
    if not texts:
        return reasons
    facts = Facts(texts)
    for name, measure in RULES.items():
        threshold = rules.get(name)
        if threshold is None:
            continue
        values = measure(facts)
        broken = values < threshold if name.startswith("min_") else values > threshold
        for number in np.flatnonzero(broken):
            reasons[number] = reasons[number] or name
    return reasons
