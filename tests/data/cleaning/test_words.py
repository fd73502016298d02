"""Words and runs of words, against a plain loop over characters."""

import random
import re
from collections.abc import Sequence

import numpy as np
import pytest

from dsv3_lightning.data.cleaning.words import ngrams, words_of

CJK = "\u3400-\u4dbf\u4e00-\u9fff\u3041-\u3096\u30a1-\u30fa"
TEXTS = [
    "Hello, world! It's 2024.",
    "",
    "数据abc处理，管道。",
    "...",
    "x",
    "the data pipeline the data pipeline " * 3,
    "ひらカタkana漢字",
    "naïve Ünïcode ＡＢＣ",
]


def split(text: str) -> list[str]:
    """Words of lower case ASCII letters, digits and Chinese characters, which is all that the texts below hold."""
    return re.findall(rf"[{CJK}]|[a-z0-9]+", text.lower())


def by_hash(texts: Sequence[str]) -> list[list[int]]:
    words = words_of(texts)
    return [words.hashes[a:b].tolist() for a, b in zip(words.bounds[:-1], words.bounds[1:])]


def test_equal_words_have_equal_hashes_and_others_do_not() -> None:
    names: dict[int, str] = {}
    for text, hashes in zip(TEXTS[:7], by_hash(TEXTS[:7])):
        assert len(hashes) == len(split(text))
        for hash, word in zip(hashes, split(text)):
            assert names.setdefault(hash, word) == word
    assert len(names) == len(set(names.values()))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The  Data\nPipeline", "the data, pipeline!"),
        ("naïve Ünïcode ＡＢＣ", "naive unicode abc"),
        ("数据，处理", "数 据\n处理。"),
        ("“quoted” — text…", '"quoted" - text...'),
    ],
)
def test_case_space_punctuation_width_and_diacritics_do_not_matter(one: str, other: str) -> None:
    assert by_hash([one]) == by_hash([other]) != [[]]


def test_a_text_has_the_same_words_alone_and_in_any_batch() -> None:
    together = by_hash(TEXTS)
    assert together == [by_hash([text])[0] for text in TEXTS]
    assert by_hash(TEXTS[::-1]) == together[::-1]
    assert by_hash([*["pad " * 5000], *TEXTS])[1:] == together


@pytest.mark.parametrize("length", [1, 2, 5, 13])
def test_runs_of_words_stay_within_a_text(length: int) -> None:
    rng = random.Random(1)
    texts = [" ".join(rng.choices("a b c 数 据".split(), k=rng.randint(0, 20))) for _ in range(50)]
    words = words_of(texts)
    grams, bounds = ngrams(words, length)
    names: dict[int, tuple[str, ...]] = {}
    for number, text in enumerate(texts):
        found = split(text)
        expected = [tuple(found[i : i + length]) for i in range(len(found) - length + 1)]
        hashes = grams[bounds[number] : bounds[number + 1]].tolist()
        assert len(hashes) == len(expected)
        for hash, gram in zip(hashes, expected):
            assert names.setdefault(hash, gram) == gram
    assert len(names) == len(set(names.values()))


def test_texts_without_words_have_none() -> None:
    words = words_of(["", "...", "\ud800", "   "])
    assert words.bounds.tolist() == [0, 0, 0, 0, 0]
    assert ngrams(words, 5)[1].tolist() == [0, 0, 0, 0, 0]


def test_facts_of_words() -> None:
    words = words_of(["ab 123 数据", "x"])
    assert words.lengths.tolist() == [2, 3, 1, 1, 1]
    assert words.letters.tolist() == [True, False, True, True, True]
    assert words.alone.tolist() == [False, False, True, True, False]


def test_hashes_are_the_same_in_every_version() -> None:
    """Signatures are stored: another value here needs another words.VERSION."""
    words = words_of(["Data 数据"])
    assert np.bitwise_xor.reduce(words.hashes).item() == HASH


HASH = 16408206840821320733
