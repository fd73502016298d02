"""fastokens encodes only where it gives what tokenizers gives; text never becomes a control token by either."""

from typing import Any

import numpy as np
import pytest

from dsv3_lightning.data.text import encoder as encoder_module
from dsv3_lightning.data.text.encoder import PROBES, Encoder, best_encoder, differs
from dsv3_lightning.data.text.tokenizer import SPECIAL_TOKENS, Tokenizer

TEXTS = ["def f(x):\n    return x + 1\n" * 9, "数据 naïve 12345 don't!\n\n", "", " \t ", *PROBES, *SPECIAL_TOKENS]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS * 3, 600)


@pytest.fixture(scope="module")
def fast(tokenizer: Tokenizer) -> Encoder:
    pytest.importorskip("fastokens", reason="fastokens is not installed")
    return Encoder(tokenizer, fast=True)


def test_fastokens_gives_the_same_ids_and_no_control_tokens(tokenizer: Tokenizer, fast: Encoder) -> None:
    generator = np.random.default_rng(0)
    strange = ["".join(map(chr, generator.integers(1, 0xD7FF, 40))) for _ in range(200)]
    for ids, expected in zip(fast.encode_batch(TEXTS + strange), tokenizer.encode_batch(TEXTS + strange), strict=True):
        assert ids.tolist() == expected.tolist() and not set(ids.tolist()) & tokenizer.control_ids
    assert differs(tokenizer, TEXTS) is None
    assert best_encoder(tokenizer, TEXTS, 1 << 30).name.startswith("fastokens ")


@pytest.mark.parametrize("pretokenization", ["v3", "llm"])
def test_both_pretokenizations_are_encoded_alike(pretokenization: str) -> None:
    pytest.importorskip("fastokens", reason="fastokens is not installed")
    assert differs(Tokenizer.train(TEXTS * 3, 500, pretokenization), TEXTS) is None


class Wrong:
    """An encoder whose ids are off by one for digits."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode_batch_flat(self, texts: list[str], split_special_tokens: bool) -> tuple[bytes, bytes]:
        found = [np.array(self.tokenizer.encode(text), "<u4") + text.startswith("1") for text in texts]
        return np.concatenate(found).astype("<u4").tobytes(), np.cumsum([0, *map(len, found)]).astype("<u8").tobytes()


def test_where_they_differ_tokenizers_encodes_and_one_line_says_why(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(encoder_module, "fast_backend", Wrong)
    chosen = best_encoder(tokenizer, ["2 is fine", "1 is not"], 100)
    assert chosen.name.startswith("tokenizers ") and [ids.tolist() for ids in chosen.encode_batch(["1 is not"])] == [
        tokenizer.encode("1 is not")
    ]
    line = capsys.readouterr().err
    assert line == "encoding by tokenizers, some ten times slower: fastokens gives other ids for '1 is not'\n"


@pytest.mark.parametrize(("size", "lines"), [(100, 0), (1 << 30, 1)])
def test_without_fastokens_only_a_large_corpus_says_so(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], size: int, lines: int
) -> None:
    def absent(given: Tokenizer) -> Any:
        raise ImportError

    monkeypatch.setattr(encoder_module, "fast_backend", absent)
    assert best_encoder(tokenizer, TEXTS, size).name.startswith("tokenizers ")
    assert capsys.readouterr().err.count("pip install 'dsv3-lightning[data]'") == lines


def test_the_ids_of_an_encoder_are_by_text_with_empty_ones(tokenizer: Tokenizer, fast: Encoder) -> None:
    found = fast.encode_batch(["", "a", "", "b\n"])
    assert [ids.tolist() for ids in found] == [[], tokenizer.encode("a"), [], tokenizer.encode("b\n")]
