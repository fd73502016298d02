"""Fill-in-the-middle and split tokens, against their definitions."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dsv3_lightning.data.config import DataConfig
from dsv3_lightning.data.text.documents import HASHES, hash_of
from dsv3_lightning.data.text.prepare import prepare
from dsv3_lightning.data.text.rewriting import Marks, Rewriting
from dsv3_lightning.data.text.store import TokenFile, read_manifest
from dsv3_lightning.data.text.tokenizer import FIM, Tokenizer
from dsv3_lightning.errors import ConfigError

TEXT = "f(a);\nb;\n{x}\n\n  return !!\r\n ...\nend.\nnaïve 数据。\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT * 20], 400)


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_a_share_of_the_texts_is_cut_in_three_that_make_the_text(rate: float) -> None:
    rewriting, texts = Rewriting(rate, 0.0, seed=3), [f"text {number} é数据" for number in range(2000)]
    cut = 0
    for text in texts:
        parts = rewriting.parts(text, hash_of(text.encode()))
        assert parts == rewriting.parts(text, hash_of(text.encode()))
        if len(parts) == 3:
            prefix, suffix, middle = parts
            assert prefix + middle + suffix == text
            cut += 1
        else:
            assert parts == [text]
    assert abs(cut - 2000 * rate) < 50
    other = Rewriting(rate, 0.0, seed=4)
    if 0 < rate:
        assert any(rewriting.parts(text, 1 << 40) != other.parts(text, 1 << 40) for text in texts)


def test_an_empty_text_can_be_filled_in_too() -> None:
    assert Rewriting(1.0, 0.0, 0).parts("", 5) == ["", "", ""]


def test_the_order_is_prefix_suffix_middle_between_the_marks_of_v3(tokenizer: Tokenizer) -> None:
    marks = Marks(tokenizer, Rewriting(1.0, 0.0, 0))
    ids = marks.filled_in([np.array(tokenizer.encode(text), np.uint32) for text in ("pre", "suf", "mid")])
    assert tokenizer.decode(ids.tolist()) == "<｜fim▁begin｜>pre<｜fim▁hole｜>suf<｜fim▁end｜>mid"
    assert sum(index in {tokenizer.backend.token_to_id(name) for name in FIM} for index in ids.tolist()) == 3


def test_every_combined_token_has_its_two_halves(tokenizer: Tokenizer) -> None:
    marks = Marks(tokenizer, Rewriting(0.0, 1.0, 0))
    for index, halves in marks.halves.items():
        text = tokenizer.decode([index])
        assert text.rstrip("\r\n") != text == tokenizer.decode(halves) and len(halves) > 1
    assert len(marks.halves) > 3
    ids = np.array(tokenizer.encode(TEXT), np.uint32)
    split = marks.split(ids, hash=7)
    assert tokenizer.decode(split.tolist()) == TEXT and not marks.combined[split].any() and len(split) > len(ids)


def test_a_share_of_them_is_split_by_the_document_and_the_place(tokenizer: Tokenizer) -> None:
    marks = Marks(tokenizer, Rewriting(0.0, 0.3, seed=1))
    ids = np.array(tokenizer.encode(";\n a" * 3000), np.uint32)
    combined = int(marks.combined[ids].sum())
    split = marks.split(ids, hash=7)
    assert combined == 3000 and abs(int(marks.combined[split].sum()) - 2100) < 120
    assert np.array_equal(split, marks.split(ids, hash=7)) and not np.array_equal(split, marks.split(ids, hash=8))
    assert tokenizer.decode(split.tolist()) == ";\n a" * 3000


def test_only_training_texts_are_rewritten_and_the_key_changes(
    tmp_path: Path, make_config: Callable[..., DataConfig]
) -> None:
    (tmp_path / "corpus").mkdir()
    for number in range(40):
        (tmp_path / "corpus" / f"{number:02}.txt").write_text(f"text number {number};\n " * (number + 1))
    plain = make_config(tmp_path, vocab_size=330)
    rewritten = dataclasses.replace(plain, fim_rate=1.0, split_rate=1.0)
    before, after = prepare(plain), prepare(rewritten)
    assert before != after and prepare(dataclasses.replace(rewritten, seed=2)) != after
    assert read_manifest(before)["inputs"].keys() == read_manifest(after)["inputs"].keys() - {"rewriting"}
    tokenizer = Tokenizer.from_file(before)
    assert tokenizer.sha256 == Tokenizer.from_file(after).sha256
    assert np.array_equal(TokenFile(before, "validation").tokens, TokenFile(after, "validation").tokens)
    hole, begin, end = (tokenizer.backend.token_to_id(name) for name in FIM)
    files = [TokenFile(folder, "train") for folder in (before, after)]
    for number in range(files[0].documents):
        text, parts = (tokenizer.decode(file.tokens[slice(*file.offsets()[number : number + 2])][1:-1].tolist())
                       for file in files)  # fmt: skip
        prefix, rest = parts.removeprefix(FIM[1]).split(FIM[0])
        suffix, middle = rest.split(FIM[2])
        assert prefix + middle + suffix == text
    tokens = files[1].tokens[:]
    assert [int((tokens == index).sum()) for index in (hole, begin, end)] == [files[0].documents] * 3
    assert (
        read_manifest(before)["splits"]["train"]["text_bytes"] == read_manifest(after)["splits"]["train"]["text_bytes"]
    )


def test_a_tokenizer_without_the_marks_is_refused(tmp_path: Path, make_config: Callable[..., DataConfig]) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "x.txt").write_text("text")
    own = Tokenizer.train(["text " * 9], 300)
    (tmp_path / "tokenizer.json").write_text(own.serialized.replace("<｜fim▁hole｜>", "<hole>"), encoding="utf-8")
    config = make_config(tmp_path, tokenizer=str(tmp_path / "tokenizer.json"), fim_rate=0.5)
    with pytest.raises(ConfigError, match="^data.fim_rate=0.5: the tokenizer has no <｜fim▁hole｜> to fill in with$"):
        prepare(config)
    assert HASHES == 2**64 and prepare(dataclasses.replace(config, fim_rate=0.0))
