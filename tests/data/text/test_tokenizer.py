"""Every text comes back, and no text becomes a control token."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_lightning.data.text.tokenizer import (
    BOS,
    EOS,
    PAD,
    SPECIAL_TOKENS,
    SPLITS,
    Tokenizer,
    cut,
    without_endless_words,
)
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.hub.tokens import write_tokenizer
from dsv3_lightning.inference.text import TextStream

STRANGE = [
    "a\r\nb\r\n", "lone\rreturn", "\t\ttabs\t", "e\u0301 is not é", "in\ufeffside", "nul\0", " leading", "trailing ",
    "👩\u200d🚀 👨\u200d👩\u200d👧", "12 345 6 7890123", "1 ,2 , 3.5e-4", "中文12かな カナ", "don't won't", "x" * 1000,
    "\u2028\u2029\x85", "\U0010ffff", "".join(map(chr, range(256))), "\n \n\t\n  x", "…—“”'’",
    *(f"a{' ' * spaces}b{' ' * spaces}" for spaces in range(1, 41)), *(" " * spaces for spaces in range(1, 41)),
    *SPECIAL_TOKENS, f"a {BOS}{EOS} b{PAD}<think></think><|end|>",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(texts: list[str]) -> Tokenizer:
    return Tokenizer.train([*texts, "  spaces      and 12 345 numbers\n" * 20], 340)


@pytest.mark.parametrize("text", STRANGE)
def test_strange_texts_come_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert min(ids) >= len(SPECIAL_TOKENS)  # text is never a control token, also where it spells one
    assert tokenizer.bytes_per_token()[ids].sum() == len(text.encode())


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_have_the_first_ids(tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer.backend.get_vocab()
    assert [vocabulary[name] for name in SPECIAL_TOKENS] == list(range(9))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (0, 1, 2, 340)
    assert tokenizer.bytes_per_token()[:9].tolist() == [0] * 9
    assert tokenizer.decode([0, *tokenizer.encode("é"), 1]) == f"{BOS}é{EOS}"
    assert tokenizer.decode([0, *tokenizer.encode("é"), 1], skip_special_tokens=True) == "é"
    assert all(token["special"] for token in json.loads(tokenizer.serialized)["added_tokens"])


def test_a_cut_character_becomes_a_replacement_sign(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(text) for text in "🙂é"]
    (cut_id,) = (index for token, index in tokenizer.backend.get_vocab().items() if token == "ð")  # byte F0
    assert tokenizer.decode([*ids[1], cut_id]) == "é\ufffd"


def test_words_are_split_as_the_patterns_say(tokenizer: Tokenizer, texts: list[str]) -> None:
    regex = pytest.importorskip("regex")  # another engine than the tokenizer's
    for text in [*STRANGE, *texts[:10]]:
        words = [text]
        for pattern in SPLITS:  # one split after the other; as one alternation, "a1b" would come out otherwise
            words = [part for word in words for part in regex.split(f"({pattern})", word, flags=regex.VERSION1) if part]
        found = [text[first:last] for _, (first, last) in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)]
        assert found == words, text


def test_long_texts_are_cut_where_a_token_begins_anyway(tokenizer: Tokenizer, texts: list[str]) -> None:
    text = "\n\n".join(texts) + " 1 22  333\n  4 " * 50
    whole = tokenizer.backend.encode(text, add_special_tokens=False).ids
    for size in (200, 1000, 5000):
        pieces = cut(text, size)
        assert "".join(pieces) == text and max(map(len, pieces)) <= size and len(pieces) >= len(text) / size
        assert [index for piece in pieces for index in tokenizer.encode(piece)] == whole
    assert [len(piece) for piece in cut("x" * 10, 4)] == [4, 4, 2]
    assert cut("", 4) == [""]


def test_batches_are_as_single_texts(tokenizer: Tokenizer, texts: list[str]) -> None:
    long = " ".join(texts) * 60  # several pieces
    batch = tokenizer.encode_batch([*texts[:5], "", long])
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in [*texts[:5], "", long]]
    assert tokenizer.decode(batch[-1].tolist()) == long
    assert batch[-1].dtype == np.uint32 and len(batch[-2]) == 0


def test_endless_words_are_not_learned() -> None:
    word, marks, chinese = "ab" * 2000, "=" * 3000, "数据，很好。" * 500
    parts = list(without_endless_words(f"x {word} y {marks} z {' ' * 2500}{chinese}"))
    assert len("".join(parts)) < 3 * 2000 + len(chinese)  # less than a block is left at each end
    assert "x " in parts[0] and "".join(parts).endswith(chinese)  # no spaces, but words
    assert list(without_endless_words("a b" * 5000)) == ["a b" * 5000]
    assert Tokenizer.train([word * 50], 300).vocab_size == 265  # the bytes and special tokens alone, and at once


def test_training_is_deterministic(texts: list[str]) -> None:
    assert Tokenizer.train(texts, 350).sha256 == Tokenizer.train(reversed(texts), 350).sha256


def test_a_pickled_tokenizer_still_guards(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode(EOS) == tokenizer.encode(EOS) != [copy.eos_id]


def test_transformers_reads_what_was_saved(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    for text in STRANGE[:100]:
        if not any(name in text for name in SPECIAL_TOKENS):
            assert theirs(text).input_ids == tokenizer.encode(text), text
            assert theirs.decode(theirs(text).input_ids) == text


Change = Callable[[dict[str, Any]], None]


def rename(description: dict[str, Any]) -> None:
    """Begin, end and padding get names that only a tokenizer_config.json can tell."""
    for token, name in zip(description["added_tokens"], ("<s>", "</s>", "<unused>")):
        description["model"]["vocab"][name] = description["model"]["vocab"].pop(token["content"])
        token["content"] = name


def write(folder: Path, tokenizer: Tokenizer, change: Change, config: dict[str, Any] | None = None) -> Path:
    description = json.loads(tokenizer.serialized)
    change(description)
    (folder / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder / "tokenizer.json"


def test_names_come_from_the_config_beside_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    read = Tokenizer.from_file(write(tmp_path, tokenizer, rename, config))
    assert (read.bos_id, read.eos_id, read.pad_id) == (0, 1, 1)  # without padding, the end serves
    read = Tokenizer.from_file(tmp_path)
    assert read.names == ("<s>", "</s>", "</s>")
    (tmp_path / "copy").mkdir()
    read.save(tmp_path / "copy")
    assert Tokenizer.from_file(tmp_path / "copy").names == read.names


def test_ordinary_added_tokens_are_no_way_in_either(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def as_in_v3(description: dict[str, Any]) -> None:  # V3 marks FIM and <think> as not special
        for token in description["added_tokens"][3:]:
            token["special"] = False
        description["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}

    read = Tokenizer.from_file(write(tmp_path, tokenizer, as_in_v3))
    text = "".join(SPECIAL_TOKENS)
    assert min(read.encode(text)) >= 9 and read.decode(read.encode(text)) == text
    assert json.loads(read.serialized)["added_tokens"][3]["special"] is False  # what is saved stays the original


LETTERS = {"ú": {}, "ü": {}, "ø": {"normalized": False}, "ö": {"single_word": True}, "  ": {}, "    ": {}, "ý": {}}
EATING = {"À": {"lstrip": True}, "þ": {"rstrip": True}}
WITH_LETTERS = ["Bạn … cú", "für Höhe, øya", "a    b  c   d", "ö ö-ö", "\n      return ý", "plain", "<think>ú</think>"]


def letters_of_others(description: dict[str, Any], letters: dict[str, dict[str, bool]]) -> None:
    """As DeepSeek LLM's and Coder's: letters, and as others have it runs of spaces, are added and not special."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    for number, (content, changed) in enumerate([*letters.items(), ("<think>", {}), ("</think>", {})]):
        description["added_tokens"].append({"id": 340 + number, "content": content, **flags, **changed})


@pytest.mark.parametrize("letters", [LETTERS, LETTERS | EATING])
def test_added_tokens_that_are_text_have_the_ids_of_transformers(tokenizer, tmp_path, letters) -> None:
    transformers = pytest.importorskip("transformers")
    read = Tokenizer.from_file(write(tmp_path, tokenizer, lambda d: letters_of_others(d, letters)))
    (tmp_path / "exported").mkdir()
    write_tokenizer(read, tmp_path / "exported", 128)
    again = Tokenizer.from_file(tmp_path / "exported")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    kinds = [
        {token.content: token.__getstate__() for token in t.added_tokens_decoder.values()} for t in (theirs, exported)
    ]
    assert kinds[0] == kinds[1]
    for text in [*WITH_LETTERS, *(["x À y", "x þ  y"] if letters is not LETTERS else [])]:
        ids = read.encode(text)
        assert again.encode(text) == ids
        if "<think>" not in text:  # a mark, which text never turns into
            assert ids == theirs.encode(text, add_special_tokens=False) == exported.encode(text)[1:], text
        stream = TextStream(read)
        streamed = "".join(stream.push(index) for index in ids) + stream.finish()
        assert streamed == read.decode(ids) == read.decode(ids, skip_special_tokens=True)
        if not set(text) & set(EATING):
            assert streamed == text and read.bytes_per_token()[ids].sum() == len(text.encode())
    assert len(read.encode("ú")) == 1 and len(read.encode("    ")) == 1 and len(read.encode("<think>")) > 1
    thought = [
        read.backend.token_to_id("<think>"),
        *read.encode("cú"),
    ]  # not special: decoding keeps it, as theirs does
    assert read.decode(thought, skip_special_tokens=True) == "<think>cú"


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"eos_token": "</s>"}},
        {"tokenizer_config.json": {"eos_token": {"__type": "AddedToken", "content": "</s>"}}},
        {"special_tokens_map.json": {"eos_token": {"content": "</s>"}}},
        {"tokenizer_config.json": {"eos_token": None}, "config.json": {"eos_token_id": 1}},
        {"config.json": {"eos_token_id": None}, "generation_config.json": {"eos_token_id": [1.0, 4]}},
    ],
)
def test_the_end_token_is_found_wherever_transformers_finds_it(tokenizer, tmp_path, files) -> None:
    path = write(tmp_path, tokenizer, rename)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    assert Tokenizer.from_file(path).eos_id == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token=3: must be text"),
        ("tokenizer_config.json", '{"bos_token": ["a"]}', 'bos_token=["a"]: must be text'),
        ("tokenizer_config.json", "[]", "not an object but []"),
        ("config.json", '{"eos_token_id": true}', "eos_token_id=true: must be a whole number"),
        ("generation_config.json", '{"eos_token_id": [1.5]}', "eos_token_id=[1.5]: must be a whole number"),
    ],
)
def test_a_file_beside_that_names_no_token_is_one_line(tokenizer, tmp_path, name, content, message) -> None:
    path = write(tmp_path, tokenizer, rename)
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        Tokenizer.from_file(path)
    assert str(error.value).startswith(f"{tmp_path / name}: ") and message in str(error.value)


def test_ids_without_text_are_gaps_and_rows_beyond(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def shift(description: dict[str, Any]) -> None:
        description["added_tokens"][-1]["id"] = 345
        description["model"]["vocab"][SPECIAL_TOKENS[-1]] = 345

    read = Tokenizer.from_file(write(tmp_path, tokenizer, shift))
    assert read.ids_without_text(349) == [8, *range(340, 345), 346, 347, 348] and read.ids_without_text(8) == []


def lower(description: dict[str, Any]) -> None:
    description["normalizer"] = {"type": "Lowercase"}


def composed(description: dict[str, Any]) -> None:
    description["normalizer"] = {"type": "NFC"}


def prefixed(description: dict[str, Any]) -> None:
    description["pre_tokenizer"]["pretokenizers"][-1]["add_prefix_space"] = True


def without_bytes(description: dict[str, Any]) -> None:
    description["decoder"] = None


@pytest.mark.parametrize("change", [lower, composed, prefixed, without_bytes])
def test_a_lossy_tokenizer_is_refused(tokenizer: Tokenizer, tmp_path: Path, change: Change) -> None:
    path = write(tmp_path, tokenizer, change)
    with pytest.raises(ConfigError, match=f"^{path}: does not reproduce every text"):
        Tokenizer.from_file(path)


V3_ENDS = [{"content": BOS}, {"content": EOS}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        ("{", "Expecting"),
        ("[1]", "not an object but [1]"),
        ('{"model": []}', "not a tokenizer.json: it has no model"),
        ('{"model": {}, "added_tokens": {"a": 1}}', 'added_tokens={"a": 1}: must be a list'),
        ('{"model": {}, "added_tokens": [{"content": 1}]}', 'added_tokens: {"content": 1} must be an object'),
        ("[" * 100_000, ": not JSON: "),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n", "is a Git LFS pointer"),
        (json.dumps({"model": {"type": "BPE", "vocab": 3}, "added_tokens": V3_ENDS}), "not a tokenizer.json"),
        ('{"model": {}, "added_tokens": []}', f"no end token: neither {EOS} nor an eos_token"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        Tokenizer.from_file(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_gaps_in_the_ids_count(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def shift(description: dict[str, Any]) -> None:
        description["added_tokens"][-1]["id"] = 70_000
        description["model"]["vocab"][SPECIAL_TOKENS[-1]] = 70_000

    read = Tokenizer.from_file(write(tmp_path, tokenizer, shift))
    assert read.vocab_size == 70_001 and len(read.bytes_per_token()) == 70_001


def test_the_pretokenization_of_deepseek_llm_has_single_digits_and_line_ends_apart() -> None:
    """Worked out by hand from the published patterns. Their third, [:-~] in it, cuts "ö" out of ASCII letters."""
    text = "Wörter 1234 sagt!\n\n(x) 数据は ok \u3000。"
    llm, v3 = (Tokenizer.train([text], 300, name) for name in ("llm", "v3"))
    words = [[text[begin:end] for _, (begin, end) in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)]
             for tokenizer in (llm, v3)]  # fmt: skip
    assert words[0] == [
        "W", "ö", "rter", " ", "1", "2", "3", "4", " sagt", "!", "\n", "\n", "(", "x", ")", " ", "数据は", " ok", " ",
        "\u3000。",
    ]  # fmt: skip
    assert words[1][:7] == ["Wörter", " ", "123", "4", " sagt", "!\n\n", "(x"]
    assert llm.decode(llm.encode(text)) == text and llm.sha256 != v3.sha256
