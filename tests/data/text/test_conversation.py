"""Conversations as training data: the format, what of it is a target, and what is said about a bad line."""

import dataclasses
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3_lightning.data.batches.dataset import IGNORE
from dsv3_lightning.data.batches.module import TextDataModule
from dsv3_lightning.data.batches.sampling import Draw
from dsv3_lightning.data.config import DataConfig
from dsv3_lightning.data.text.conversation import ROLES, conversation
from dsv3_lightning.data.text.corpus import find_sources, read_documents
from dsv3_lightning.data.text.prepare import prepare
from dsv3_lightning.data.text.store import TokenFile, read_manifest
from dsv3_lightning.data.text.tokenizer import ASSISTANT, SPECIAL_TOKENS, USER, Tokenizer
from dsv3_lightning.data.text.tokenizer import BOS as BEGIN
from dsv3_lightning.data.text.tokenizer import EOS as END
from dsv3_lightning.errors import ConfigError

Make = Callable[..., Any]


def talk(*said: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages of user and assistant in turns."""
    messages = [{"role": ROLES[1 + number % 2], "content": text} for number, text in enumerate(said)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


TALKS = [
    talk("q", "a"),
    talk("hello", "Hello! 你好 🙂", "and more?", "  two spaces, then\n\nlines\n"),
    talk("who are you?", "a model", system="be brief"),
    talk("say nothing", ""),
    talk(f"what is {END}?", f"{END}{USER} ends a turn"),  # text, no control tokens
    talk("no answer yet", "one", "and this?"),
    *(talk(f"question {n} " * (n % 9), f"answer {n} " * (n * 7 % 60 + 1), system="s" * (n % 3)) for n in range(40)),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, make_config: Callable[..., DataConfig]) -> DataConfig:
    folder = tmp_path_factory.mktemp("talks")
    write(folder / "talks.jsonl", TALKS)
    paths = [str(folder / "talks.jsonl")]
    return make_config(folder, paths=paths, text_key="messages", sequence_length=48, mask_document_ends=True)


def write(path: Path, values: list[Any]) -> None:
    lines = "".join(json.dumps({"messages": value, "id": number}) + "\n" for number, value in enumerate(values))
    path.write_text(lines, encoding="utf-8")


def answers_of(messages: list[dict[str, str]]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "assistant"]


def spelled(messages: list[dict[str, str]]) -> str:
    marks = {"system": ("", ""), "user": (USER, ""), "assistant": (ASSISTANT, END)}
    return BEGIN + "".join(m["content"].join(marks[m["role"]]) for m in messages)


def test_the_ids_of_a_conversation_and_of_its_answers(config: DataConfig) -> None:
    tokenizer = Tokenizer.from_file(prepare(config))
    for messages in TALKS:
        ids, answers = conversation(tokenizer, [(m["role"], tokenizer.encode(m["content"])) for m in messages])
        assert tokenizer.decode(ids) == spelled(messages)
        assert [tokenizer.decode(ids[begin:end]) for begin, end in answers] == [a + END for a in answers_of(messages)]
        control = sum(token < len(SPECIAL_TOKENS) for token in ids)  # those of the format, none of the text
        assert control == 1 + sum(message["role"] == "user" for message in messages) + 2 * len(answers)


def test_every_token_of_an_answer_is_a_target_once_and_nothing_else_is(config: DataConfig, make_module: Make) -> None:
    module: TextDataModule = make_module(config, mtp_depth=2)
    assert len(module._datasets["train"].index.continues.nonzero()[0]) > 5  # some are longer than a sample
    for split in ("train", "validation"):
        dataset = module._datasets[split]
        bounds, ids = dataset.file.answers(), dataset.file.tokens.tolist()
        learned = sorted(token for begin, end in bounds.reshape(-1, 2) for token in ids[begin:end])
        batch = dataset[Draw(np.arange(len(dataset)), np.zeros(3, dtype=np.int64))]
        assert np.array_equal(dataset.index.target_counts, (batch["targets"] != IGNORE).sum(2))
        for k in range(3):
            targets = batch["targets"][:, k]
            assert sorted(targets[targets != IGNORE].tolist()) == learned
        assert (~batch["mask"]).sum() == (batch["tokens"] == module.tokenizer.pad_id).sum()  # prompts are context


def test_bits_per_byte_are_of_the_answers_bytes(config: DataConfig, make_module: Make) -> None:
    module: TextDataModule = make_module(config)
    splits = module.manifest["splits"]
    found = sum(int(batch["target_bytes"].sum()) for batch in module.val_dataloader())
    assert found == module.validation_bytes == splits["validation"]["answer_bytes"] > 0
    both = [sum(splits[split][name] for split in splits) for name in ("answer_bytes", "text_bytes")]
    texts = [m["content"] for messages in TALKS for m in messages]
    assert both == [len("".join(sum(map(answers_of, TALKS), [])).encode()), len("".join(texts).encode())]


def test_gzip_gets_the_text_that_is_learned(config: DataConfig) -> None:
    manifest = read_manifest(prepare(dataclasses.replace(config, validation_fraction=0.5)))
    folder = prepare(dataclasses.replace(config, validation_fraction=0.5))
    file, tokenizer = TokenFile(folder, "validation"), Tokenizer.from_file(folder)
    bounds = file.answers()
    assert bounds is not None
    said = "".join(tokenizer.decode(file.tokens[a : b - 1].tolist()) for a, b in bounds.reshape(-1, 2)).encode()
    assert manifest["gzip_bytes"] == len(gzip.compress(said, 9))
    assert manifest["gzip_bpb"] == 8 * manifest["gzip_bytes"] / len(said)


def test_texts_and_conversations_may_stand_in_one_file(config: DataConfig, tmp_path: Path, make_module: Make) -> None:
    write(tmp_path / "mixed.jsonl", ["plain text", talk("q", "a"), "more", "of it", talk("r", "b")])
    mixed = dataclasses.replace(config, paths=[str(tmp_path / "mixed.jsonl")], validation_fraction=0.0)
    module: TextDataModule = make_module(mixed, max_steps=1)
    (file,) = [module._datasets["train"].file]
    bounds, ids = file.answers(), file.tokens.tolist()
    texts = [module.tokenizer.decode(ids[begin:end]) for begin, end in bounds.reshape(-1, 2)]
    assert texts == [f"{BEGIN}plain text{END}", f"a{END}{BEGIN}more{END}{BEGIN}of it{END}", f"b{END}"]


def test_plain_text_has_no_such_file_and_the_folder_it_always_had(
    tmp_path: Path, make_config: Callable[..., DataConfig]
) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/a.txt").write_text("some text, always the same")
    folder = prepare(make_config(tmp_path, vocab_size=300))
    assert folder.name == "2f6a1c2a75df743f" and not list(folder.rglob("*.ans"))
    assert TokenFile(folder, "train").answers() is None and "answer_bytes" not in str(read_manifest(folder))


def test_equal_conversations_stay_on_one_side(tmp_path: Path, config: DataConfig) -> None:
    write(tmp_path / "twice.jsonl", TALKS[:6] * 2)
    folder = prepare(dataclasses.replace(config, paths=[str(tmp_path / "twice.jsonl")], validation_fraction=0.5))
    sizes = [np.diff(TokenFile(folder, split).offsets()).tolist() for split in ("train", "validation")]
    assert all(side and len(side) % 2 == 0 and side[: len(side) // 2] == side[len(side) // 2 :] for side in sizes)


@pytest.mark.parametrize("end", [None, "<|EOT|>"])
def test_another_end_token_ends_texts_and_answers(config: DataConfig, end: str | None) -> None:
    folder = prepare(dataclasses.replace(config, end_token=end))
    tokenizer = Tokenizer.from_file(folder)
    name = end or END
    assert tokenizer.names[1] == name
    assert json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"] == name
    texts = [tokenizer.decode(TokenFile(folder, split).tokens.tolist()) for split in ("train", "validation")]
    assert f"Hello! 你好 🙂{name}{USER}" in "".join(texts)
    given = prepare(dataclasses.replace(config, tokenizer=str(folder), end_token="<|EOT|>"))
    assert Tokenizer.from_file(given).names[1] == "<|EOT|>"
    assert Tokenizer.from_file(prepare(dataclasses.replace(config, tokenizer=str(folder)))).names[1] == name


def test_an_end_token_that_is_none_is_one_line(config: DataConfig) -> None:
    folder = str(prepare(config))
    for tokenizer, end in ((None, "<|im_end|>"), (folder, "<|im_end|>"), (folder, "a")):
        with pytest.raises(ConfigError) as error:
            prepare(dataclasses.replace(config, tokenizer=tokenizer, end_token=end))
        expected = f"data.end_token={end}: the tokenizer has no such control token; it has {BEGIN} {END} "
        assert str(error.value).startswith(expected) and str(error.value).endswith("<|EOT|>")


def test_a_tokenizer_without_the_marks_is_one_line(config: DataConfig, tmp_path: Path) -> None:
    serialized = (prepare(config) / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(serialized.replace(USER, "<｜Somebody｜>"), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"^the tokenizer has no {USER} and {ASSISTANT}"):
        prepare(dataclasses.replace(config, tokenizer=str(tmp_path)))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages=[]: must hold messages, such as {role: user, content: …}"),
        ([*talk("q", "a"), "text"], "messages[2]: must have a role and a content"),
        ([{"role": "user"}], "messages[0]: must have a role and a content"),
        ([{"from": "human", "value": "x"}], "messages[0]: must have a role and a content"),
        ([{"role": "tool", "content": "x"}], "messages[0].role=tool: must be system, user or assistant"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role=['user']: must be system, user or assistant"),
        ([{"role": "user", "content": None}], "messages[0].content: must be text, is a NoneType"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content: must be text, is a list"),
        (talk("q"), "messages: has no message of the assistant, so there is nothing to learn"),
        (
            [*talk("q", "a", system="s"), {"role": "system", "content": "t"}],
            "messages[3].role=system: must be the first message, and the only one of that role",
        ),
    ],
)
def test_a_bad_conversation_is_named_by_file_and_line(tmp_path: Path, messages: list[Any], message: str) -> None:
    write(tmp_path / "x.jsonl", [talk("q", "a"), messages])
    with pytest.raises(ConfigError) as error:
        list(read_documents(find_sources([str(tmp_path / "x.jsonl")]), "messages"))
    assert str(error.value) == f"data.paths: {tmp_path / 'x.jsonl'}, line 2: {message}"
