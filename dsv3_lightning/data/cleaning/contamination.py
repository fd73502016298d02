"""Decontamination: texts that share a run of words with an evaluation set.

Runs are compared as words.py has them, so that case, white space and punctuation don't matter.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_lightning.common.files import utf8_path
from dsv3_lightning.common.paths import user_path
from dsv3_lightning.data.cleaning.words import Words, mixed, ngrams, words_of
from dsv3_lightning.errors import ConfigError

SHORTEST = 8  # words; shorter questions are in too many texts
TEMPLATE = 8  # a run of words in more items of a set than this is an instruction, not a question
FILTER_BITS = 20


@dataclass(frozen=True)
class Contamination:
    """The runs of words of evaluation sets.

    runs: by their length in words, their sorted hashes, uint64 [n]. items: how many texts they come from; too_short:
    how many texts of the sets have too few words to be searched for.
    """

    runs: dict[int, np.ndarray]
    items: int
    too_short: int

    @classmethod
    def of_files(cls, paths: Sequence[str], length: int, cjk_length: int) -> "Contamination":
        """The runs of all texts in jsonl files: of every field, also inside of lists. Raises ConfigError.

        length: words of a run; cjk_length: the same for texts that are mostly Chinese characters or kana. A text with
        fewer words is one run as a whole, if it has SHORTEST words, or in proportion characters.
        """
        runs: dict[int, list[np.ndarray]] = {}
        items = too_short = 0
        for path in paths:
            texts = list(dict.fromkeys(texts_of(path)))
            words = words_of(texts)
            counts = np.diff(words.bounds)
            sums = np.concatenate([[0], np.cumsum(words.alone)])
            cjk = sums[words.bounds[1:]] - sums[words.bounds[:-1]] > counts / 2
            whole = np.where(cjk, cjk_length, length)
            shortest = np.where(cjk, SHORTEST * cjk_length // length, SHORTEST)
            wanted = np.minimum(counts, whole)
            usable = counts >= np.minimum(shortest, whole)
            items += int(usable.sum())
            too_short += int((~usable).sum())
            for size in np.unique(wanted[usable]):
                chosen = words_of([texts[number] for number in np.flatnonzero(usable & (wanted == size))])
                runs.setdefault(int(size), []).append(without_templates(*ngrams(chosen, int(size))))
        return cls({size: np.unique(np.concatenate(found)) for size, found in sorted(runs.items())}, items, too_short)

    def found(self, words: Words) -> np.ndarray:
        """Which texts share a run of words with an evaluation set: bool [texts]."""
        found = np.zeros(len(words.bounds) - 1, bool)
        for size, known in self.runs.items():
            grams, bounds = ngrams(words, size)
            if len(hits := np.flatnonzero(is_in(grams, known))):
                found[np.searchsorted(bounds, hits, "right") - 1] = True
        return found


def is_in(grams: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which values are among the sorted known ones. A table of their upper bits settles nearly all at once."""
    table = np.zeros(1 << FILTER_BITS, bool)
    shift = np.uint64(64 - FILTER_BITS)
    table[known >> shift] = True
    found = table[grams >> shift]
    candidates = np.flatnonzero(found)
    values = grams[candidates]
    places = np.minimum(np.searchsorted(known, values), len(known) - 1)
    found[candidates] = known[places] == values
    return found


def without_templates(grams: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The different values, without those in more than TEMPLATE of the texts. grams, bounds: as of `ngrams`."""
    text = np.repeat(np.arange(len(bounds) - 1, dtype=np.uint64), np.diff(bounds))
    _, first = np.unique(grams ^ mixed(text + np.uint64(1)), return_index=True)  # one for each text
    values, counts = np.unique(grams[first], return_counts=True)
    return values[counts <= TEMPLATE]


def texts_of(path: str) -> Iterator[str]:
    """Every text in a jsonl file, or the file's paragraphs if it is a .txt. Raises ConfigError."""
    where = f"data.cleaning.decontaminate: {utf8_path(path)}"
    try:
        lines = user_path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: {getattr(error, 'strerror', None) or error}") from error
    if Path(path).suffix != ".jsonl":
        yield from (part for part in lines.split("\n\n") if part.strip())
        return
    for number, line in enumerate(lines.split("\n"), 1):
        if line.strip():
            try:
                yield from strings(json.loads(line))
            except ValueError as error:
                raise ConfigError(f"{where}, line {number}: not JSON: {error}") from None


def strings(value: Any) -> Iterator[str]:
    """All texts inside of lists and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inside in value.values() if isinstance(value, dict) else value:
            yield from strings(inside)
