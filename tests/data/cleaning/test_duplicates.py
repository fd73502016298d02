"""Signatures and duplicates: against loops over sets, and planted near duplicates in three kinds of text."""

import random

import numpy as np
import pytest

from dsv3_lightning.data.cleaning.duplicates import digest, joined, repeated, similar
from dsv3_lightning.data.cleaning.minhash import BLOCK, EMPTY, bucket_keys, functions, match_probability, signatures
from dsv3_lightning.data.cleaning.words import ngrams, words_of

VOCABULARY = {
    "english": [f"word{number}" for number in range(5000)],
    "chinese": [chr(0x4E00 + number) for number in range(5000)],
    "code": [f"self.name_{number}(" for number in range(5000)],
}
JOIN = {"english": " ", "chinese": "", "code": "\n    "}


def signed(texts: list[str], count: int = 112) -> np.ndarray:
    return signatures(*ngrams(words_of(texts), 5), count)


def jaccard(one: str, other: str) -> float:
    words = words_of([one, other])
    grams, bounds = ngrams(words, 5)
    a, b = set(grams[: bounds[1]].tolist()), set(grams[bounds[1] :].tolist())
    return len(a & b) / len(a | b)


def pair(kind: str, changes: int, rng: random.Random) -> tuple[str, str]:
    words = rng.choices(VOCABULARY[kind], k=300)
    changed = list(words)
    for place in rng.sample(range(300), changes):
        changed[place] = rng.choice(VOCABULARY[kind])
    return JOIN[kind].join(words), JOIN[kind].join(changed)


def test_a_signature_is_the_least_of_each_hash_over_the_runs() -> None:
    texts = ["a b c d e f g h", "one two", "", " ".join(map(str, range(50)))]
    grams, bounds = ngrams(words_of(texts), 5)
    factors, terms = (values.astype(object) for values in functions(7))
    for number, row in enumerate(signatures(grams, bounds, 7)):
        values = [int(gram) >> 32 for gram in grams[bounds[number] : bounds[number + 1]]]
        least = [min((f * v + t) % 2**32 for v in values) if values else int(EMPTY) for f, t in zip(factors, terms)]
        assert row.tolist() == least


def test_signatures_do_not_depend_on_the_blocks_or_the_batch() -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices(VOCABULARY["english"], k=size)) for size in (10, BLOCK, 3, 2 * BLOCK + 7, 100)]
    together = signed(texts, 8)
    assert (together == np.concatenate([signed([text], 8) for text in texts])).all()


@pytest.mark.parametrize("kind", VOCABULARY)
def test_equal_values_estimate_the_similarity(kind: str) -> None:
    rng = random.Random(3)
    errors = []
    for changes in (0, 5, 10, 20, 40):
        for _ in range(8):
            one, other = pair(kind, changes, rng)
            a, b = signed([one, other])
            errors.append((a == b).mean() - jaccard(one, other))
    assert abs(np.mean(errors)) < 0.02 and np.abs(errors).max() < 0.2  # standard error of one: 0.047


@pytest.mark.parametrize("kind", VOCABULARY)
def test_as_many_pairs_are_found_as_the_curve_says(kind: str) -> None:
    rng = random.Random(4)
    pairs = [pair(kind, changes, rng) for changes in (0, 3, 6, 9, 12, 15, 20, 40) for _ in range(25)]
    rows = signed([text for both in pairs for text in both])
    alike = [jaccard(*both) for both in pairs]
    keys = np.stack([bucket_keys(rows, bucket, 8) for bucket in range(14)], 1)
    found = (keys[::2] == keys[1::2]).any(1)
    expected = np.array([match_probability(value, 14, 8) for value in alike])
    deviation = np.sqrt((expected * (1 - expected)).sum())
    assert abs(found.sum() - expected.sum()) < 4 * deviation + 1
    assert found[:25].all() and found.sum() > 50  # those without a change
    others = similar(lambda bucket: bucket_keys(rows[::2], bucket, 8), 14)
    assert not others.any()  # no pair of different documents


def test_texts_without_runs_match_nothing() -> None:
    rows = signed(["one two", "three", "", "a b c d e", "a b c d e"])
    assert similar(lambda bucket: bucket_keys(rows, bucket, 8), 14).tolist() == [False, False, False, False, True]


def test_components_are_those_of_a_search_through_the_graph() -> None:
    rng = random.Random(5)
    for _ in range(20):
        size = rng.randint(1, 60)
        edges = [(rng.randrange(size), rng.randrange(size)) for _ in range(rng.randint(0, 60))]
        lowest = list(range(size))
        for _ in range(size):
            for a, b in edges:
                lowest[a] = lowest[b] = min(lowest[a], lowest[b])
        left, right = np.array([*zip(*edges)] or [[], []], np.int64)
        half = len(edges) // 2
        found = joined(joined(np.arange(size), left[:half], right[:half]), left[half:], right[half:])
        assert found.tolist() == lowest


def test_the_first_of_a_chain_of_near_duplicates_stays() -> None:
    keys = np.array([[5, 5, 9, 0, 9], [1, 2, 2, 0, 3]], np.uint64)  # 0~1 by bucket 0, 1~2 by bucket 1, 2~4
    assert similar(lambda bucket: keys[bucket], 2).tolist() == [False, True, True, False, True]


def test_exact_duplicates_are_those_that_differ_in_white_space_alone() -> None:
    texts = ["a b", "a  b\n", "A b", "e\u0301", "é", "", " ", "a b"]
    digests = np.array([np.frombuffer(digest(text), np.uint64) for text in texts])
    assert repeated(digests).tolist() == [False, True, False, False, True, False, True, True]
    assert repeated(digests[:0]).tolist() == []
