"""Conversations as training data: the format, what of it is a target, and what is said about a bad line."""

import dataclasses
import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3_lightning.data.batches.dataset import IGNORE
from dsv3_lightning.data.batches.module import TextDataModule
from dsv3_lightning.data.batches.sampling import MicroBatch
from dsv3_lightning.data.config import DataConfig
from dsv3_lightning.data.text.conversation import ROLES, conversation
from dsv3_lightning.data.text.corpus import read_documents
from dsv3_lightning.data.text.messages import parse
from dsv3_lightning.data.text.prepare import prepare
from dsv3_lightning.data.text.sources import find_sources
from dsv3_lightning.data.text.store import TokenFile, read_manifest
from dsv3_lightning.data.text.tally import ReadStats
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
        bounds, ids = dataset.file.loss_spans(), dataset.file.tokens.tolist()
        learned = sorted(token for begin, end in bounds.reshape(-1, 2) for token in ids[begin:end])
        batch = dataset[MicroBatch(np.arange(len(dataset)))]
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
    bounds = file.loss_spans()
    assert bounds is not None
    said = "".join(tokenizer.decode(file.tokens[a : b - 1].tolist()) for a, b in bounds.reshape(-1, 2)).encode()
    assert manifest["gzip_bytes"] == len(gzip.compress(said, 9))
    assert manifest["gzip_bpb"] == 8 * manifest["gzip_bytes"] / len(said)


def test_texts_and_conversations_may_stand_in_one_file(config: DataConfig, tmp_path: Path, make_module: Make) -> None:
    write(tmp_path / "mixed.jsonl", ["plain text", talk("q", "a"), "more", "of it", talk("r", "b")])
    mixed = dataclasses.replace(config, paths=[str(tmp_path / "mixed.jsonl")], validation_fraction=0.0)
    module: TextDataModule = make_module(mixed, max_steps=1)
    (file,) = [module._datasets["train"].file]
    bounds, ids = file.loss_spans(), file.tokens.tolist()
    texts = [module.tokenizer.decode(ids[begin:end]) for begin, end in bounds.reshape(-1, 2)]
    assert texts == [f"{BEGIN}plain text{END}", f"a{END}{BEGIN}more{END}{BEGIN}of it{END}", f"b{END}"]


def test_plain_text_has_no_such_file_and_the_folder_it_always_had(
    tmp_path: Path, make_config: Callable[..., DataConfig]
) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/a.txt").write_text("some text, always the same")
    folder = prepare(make_config(tmp_path, vocab_size=300))
    assert folder.name == "13845e6c900371c6" and not list(folder.rglob("*.ans"))
    assert TokenFile(folder, "train").loss_spans() is None and "answer_bytes" not in str(read_manifest(folder))


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
        ([{"from": "human", "value": "x"}], "messages: has no message of the assistant, so there is nothing to learn"),
        ([{"from": "tool", "value": "x"}], 'messages[0].from="tool": must be human, gpt or system'),
        (
            [{"role": "human", "content": "x"}],
            "messages[0].role=human: must be system, user or assistant; user is probably meant",
        ),
        (
            [{"role": "Assistant", "content": "x"}],
            "messages[0].role=Assistant: must be system, user or assistant; assistant is probably meant",
        ),
        ([{"role": "tool", "content": "x"}], "messages[0].role=tool: must be system, user or assistant"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role=['user']: must be system, user or assistant"),
        ([{"role": "user", "content": None}], "messages[0].content: must be text, is null"),
        (
            [{"role": "user", "content": ["x"]}],
            'messages[0].content[0]="x": must be {type: text, text: …}; only text is learned',
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            'messages[0].content[0]={"type": "image_url", "image_url": {}}: must be {type: text, text: …}; only text '
            "is learned",
        ),
        ([{"role": "user", "content": 3}], "messages[0].content: must be text, is a number"),
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
    reported = f"data.paths: {tmp_path / 'x.jsonl'}, line 2: {message}; data.skip_bad_lines=true leaves bad lines out"
    assert str(error.value) == reported


def said_and_learned(line: dict[str, Any], key: str = "messages") -> tuple[list[tuple[str, str, bool]], Counter[str]]:
    unread: Counter[str] = Counter()
    return [tuple(message) for message in parse(line, key, unread)], unread


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"train": False}, {"loss": 0.0}, {"loss_mask": 0}, {"trainable": False}]
)
def test_an_answer_that_is_marked_is_not_learned(config: DataConfig, tmp_path: Path, mark: dict[str, Any]) -> None:
    messages = [*talk("q", "first"), *talk("r", "second")]
    messages[1] |= mark
    messages[3] |= {name: 1 for name in mark}
    assert [message[2] for message in said_and_learned({"messages": messages})[0]] == [False, False, False, True]
    write(tmp_path / "x.jsonl", [messages])
    marked = dataclasses.replace(config, paths=[str(tmp_path / "x.jsonl")], validation_fraction=0.0)
    folder = prepare(marked)
    file, tokenizer, manifest = TokenFile(folder, "train"), Tokenizer.from_file(folder), read_manifest(folder)
    bounds = file.loss_spans()
    assert bounds is not None
    assert [tokenizer.decode(file.tokens[a:b].tolist()) for a, b in bounds.reshape(-1, 2)] == [f"second{END}"]
    assert tokenizer.decode(file.tokens.tolist()) == spelled(messages)  # the first is context
    assert manifest["splits"]["train"]["answer_bytes"] == len("second")


def test_a_line_that_is_marked_as_a_whole_is_left_out_and_counted(tmp_path: Path) -> None:
    lines = [{"messages": talk("q", "a"), "weight": 0}, {"messages": talk("q", "b"), "train": True}]
    lines.append({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "c", "weight": 0}]})
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stats = ReadStats()
    found = list(read_documents(find_sources([str(tmp_path / "x.jsonl")]), "messages", stats))
    assert [[message.text for message in document] for document in found] == [["q", "b"]]
    assert stats == ReadStats(documents=1, unlearned=2)


@pytest.mark.parametrize(
    ("where", "fields", "message"),
    [
        (1, {"weight": 0.5}, "messages[1].weight=0.5: seems to mark what is learned; valid marks are weight, train,"),
        (1, {"train_detail": [{"begin": 0}]}, "messages[1].train_detail="),
        (1, {"masks": [0, 1]}, "messages[1].masks=[0, 1]: seems to mark what is learned"),
        (1, {"lossMask": 1}, "messages[1].lossMask=1: seems to mark what is learned"),
        (1, {"weight": "0"}, 'messages[1].weight="0": seems to mark what is learned'),
        (
            0,
            {"weight": 1},
            "messages[0]: a mark says that a message of the user is learned; only the assistant's can be",
        ),
        (1, {"tool_calls": [{"id": "1"}]}, 'messages[1].tool_calls=[{"id": "1"}]: has no place in the format'),
        (1, {"function_call": {"name": "f"}}, "messages[1].function_call="),
        (1, {"reasoning_content": "hm"}, 'messages[1].reasoning_content="hm": has no place in the format'),
        (0, {"name": "Ada"}, 'messages[0].name="Ada": has no place'),
        (0, {"images": ["a.png"]}, "messages[0].images="),
        (1, {"prefix": True}, "messages[1].prefix=true: has no place"),
        (None, {"tools": [{"type": "function"}]}, 'tools=[{"type": "function"}]: has no place'),
        (None, {"images": ["a.png"]}, 'images=["a.png"]: has no place'),
        (None, {"weight": 0.3}, "weight=0.3: seems to mark what is learned"),
        (None, {"loss_mask": [0, 1]}, "loss_mask=[0, 1]: seems to mark what is learned"),
    ],
)
def test_what_cannot_be_honored_is_refused_by_field(where: int | None, fields: dict[str, Any], message: str) -> None:
    line: dict[str, Any] = {"messages": talk("q", "a")}
    (line if where is None else line["messages"][where]).update(fields)
    with pytest.raises(ConfigError) as error:
        said_and_learned(line)
    assert str(error.value).startswith(message)


def test_neutral_fields_change_nothing_and_others_are_counted() -> None:
    messages: list[dict[str, Any]] = talk("q", "a")
    messages[1] |= {"tool_calls": [], "name": None, "reasoning_content": "", "weight": None, "id": 4}
    found, unread = said_and_learned({"messages": messages, "tools": "[]", "source": "web", "id": 7})
    assert found == [("user", "q", False), ("assistant", "a", True)] and unread == {"source": 1, "id": 2}


def test_sharegpt_and_content_parts_are_the_same_conversation() -> None:
    expected = said_and_learned({"messages": talk("q", "a b", system="s")})[0]
    shared = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a b"}]
    assert said_and_learned({"conversations": shared}, "conversations")[0] == expected
    assert said_and_learned({"conversations": shared[1:], "system": "s"}, "conversations")[0] == expected
    parts = talk("q", "", system="s")
    parts[2]["content"] = [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]  # type: ignore[assignment]
    assert said_and_learned({"messages": parts})[0] == expected
    with pytest.raises(ConfigError, match='^system="t": the messages also have a system text'):
        said_and_learned({"conversations": shared, "system": "t"}, "conversations")
