"""Lines of jsonl files as pairs of answers or as prompts, in tokens. Imports no torch.

A line has a `prompt` or `messages`. Text under `prompt` is continued as it is; a list of messages, under either name,
is a conversation that ends with the user's turn, in the format of data/text/conversation.py. A pair's line also has
`chosen` and `rejected`: text, or the assistant's message alone in a list, as TRL's files have it. With
`rejected_ends: false` the text was cut, so that no end token follows it (`chosen_ends` likewise). Of prompts, messages
may end with the assistant's: its text is then the field `answer`.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv3_lightning.common.json_files import parse_object, shown
from dsv3_lightning.data.config import DEFAULTS, DataConfig
from dsv3_lightning.data.text.conversation import conversation, turn_ids
from dsv3_lightning.data.text.corpus import BOM, BadLines, TooLong, lines_of, refuse_other_layouts
from dsv3_lightning.data.text.messages import parse_message
from dsv3_lightning.data.text.sources import LINE_SUFFIXES, Source, find_sources, unreadable
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError

PROMPTS = ("prompt", "messages")


class Lines(NamedTuple):
    """Lines as arrays. tokens: all ids, int32. bounds: where prompt and answers of each line begin, and where the last
    ends, int64 [lines, parts + 1]. shown, columns: as in Line."""

    tokens: np.ndarray
    bounds: np.ndarray
    shown: list[Any]
    columns: list[dict[str, Any]]

    def parts(self, number: int) -> list[np.ndarray]:
        """Prompt and answers of a line, each [n]."""
        bounds = self.bounds[number]
        return [self.tokens[begin:end] for begin, end in zip(bounds, bounds[1:])]


class Line(NamedTuple):
    """A line. prompt: ids from the begin token to where the answer begins. answers: ids, each with its end token; empty
    for a prompt alone. shown: the prompt as reward functions see it, text or messages. columns: the other fields."""

    prompt: list[int]
    answers: list[list[int]]
    shown: str | list[dict[str, str]]
    columns: dict[str, Any]


def read(config: DataConfig, tokenizer: Tokenizer, pairs: bool) -> tuple[list[Line], int]:
    """The lines of data.paths, and the number of bad ones that data.skip_bad_lines left out. Raises ConfigError."""
    found, skipped = [], 0
    for source in files_of(config):
        bad = BadLines(source)
        try:
            for number, text in numbered(source, config.max_document_bytes):
                try:
                    found.append(parse(text, tokenizer, pairs))
                except ConfigError as error:
                    bad.add(number, str(error))
        except (OSError, EOFError) as error:
            raise unreadable(source.where, error) from error
        if bad.count and not config.skip_bad_lines:
            raise bad.error()
        skipped += bad.count
    return found, skipped


def read_file(path: Path, tokenizer: Tokenizer) -> Lines:
    """The prompts of one file. Raises ConfigError."""
    (source,) = find_sources([str(path)], setting="prompts")
    bad, found = BadLines(source), list[Line]()
    for number, text in numbered(source, DEFAULTS["max_document_bytes"]):
        try:
            found.append(parse(text, tokenizer, pairs=False))
        except ConfigError as error:
            bad.add(number, str(error))
    if bad.count:
        raise bad.error()
    if not found:
        raise ConfigError(f"{path}: no prompts")
    tokens = np.array([token for line in found for token in line.prompt], dtype=np.int32)
    ends = np.cumsum([0, *(len(line.prompt) for line in found)])
    return Lines(
        tokens, np.stack([ends[:-1], ends[1:]], 1), [line.shown for line in found], [line.columns for line in found]
    )


def files_of(config: DataConfig) -> list[Source]:
    """The jsonl files of data.paths. Raises ConfigError."""
    if not config.paths:
        raise ConfigError("data.paths=[]: must name a .jsonl file of prompts or pairs")
    sources = find_sources(config.paths)
    for source in sources:
        if not source.path.name.lower().endswith(LINE_SUFFIXES):
            raise ConfigError(f"{source.where}: must be a .jsonl file, also as .gz or .zst")
    return sources


def numbered(source: Source, most_bytes: int) -> Iterator[tuple[int, str]]:
    """The lines that aren't blank, with their numbers. Raises ConfigError for longer ones and other kinds of files."""
    first = True
    for number, line in enumerate(lines_of(source.path, most_bytes), 1):
        if isinstance(line, TooLong):
            raise ConfigError(f"{source.where}, line {number}: has {line.size:,} bytes, data.max_document_bytes allows "
                              f"{most_bytes:,}")  # fmt: skip
        line = line.removeprefix(BOM) if number == 1 else line
        if line.strip():
            if first:
                refuse_other_layouts(source, line)
            first = False
            yield number, line.decode(errors="replace")


def parse(text: str, tokenizer: Tokenizer, pairs: bool) -> Line:
    """A line in tokens. Raises ConfigError, which names neither file nor line."""
    record = parse_object(text)
    names = [name for name in PROMPTS if name in record]
    if len(names) != 1:
        raise ConfigError(f"must have either prompt or messages; the line has {', '.join(record) or 'no keys'}")
    asked, taken = record[names[0]], {names[0]}
    if not pairs and isinstance(asked, list) and asked and isinstance(asked[-1], dict):
        *earlier, last = asked
        if last.get("role") == "assistant":
            asked, record = earlier, {"answer": last.get("content")} | record
    prompt, shown = prompt_of(asked, names[0], tokenizer)
    answers = []
    if pairs:
        answers = [answer_ids(record, name, tokenizer) for name in ("chosen", "rejected")]
        taken |= {"chosen", "rejected", "chosen_ends", "rejected_ends"}
        if answers[0] == answers[1]:
            raise ConfigError("chosen and rejected are the same")
    reserved = {"prompts", "completions", "completion_ids"} & record.keys()
    if reserved:
        raise ConfigError(f"{min(reserved)}: is a name that reward functions are called with; rename the field")
    return Line(prompt, answers, shown, {name: value for name, value in record.items() if name not in taken})


def prompt_of(value: Any, name: str, tokenizer: Tokenizer) -> tuple[list[int], str | list[dict[str, str]]]:
    if isinstance(value, str) and name == "prompt":
        return [tokenizer.bos_id, *tokenizer.encode(value)], value
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{name}={shown(value)}: must be {'text or ' if name == 'prompt' else ''}a list of messages")
    messages = [parse_message(message, number, f"{name}[{number}]", Counter()) for number, message in enumerate(value)]
    if messages[-1].role != "user":
        raise ConfigError(f"{name}: must end with a message of the user, which the answer follows")
    written = conversation(tokenizer, [(one.role, tokenizer.encode(one.text)) for one in messages])
    ids = [*written.ids, turn_ids(tokenizer)[1]]
    return ids, [{"role": one.role, "content": one.text} for one in messages]


def answer_ids(record: dict[str, Any], name: str, tokenizer: Tokenizer) -> list[int]:
    ends = record.get(f"{name}_ends", True)
    if not isinstance(ends, bool):
        raise ConfigError(f"{name}_ends={shown(ends)}: must be true or false")
    ids = [*tokenizer.encode(answer_of(record, name)), *([tokenizer.eos_id] if ends else [])]
    if not ids:
        raise ConfigError(f"{name}: is empty")
    return ids


def answer_of(record: dict[str, Any], name: str) -> str:
    """The text of an answer. Raises ConfigError."""
    value = record.get(name)
    if isinstance(value, list) and len(value) == 1:
        message = parse_message(value[0], 1, f"{name}[0]", Counter())
        if message.role == "assistant":
            return message.text
    if not isinstance(value, str):
        found = "is missing" if name not in record else f"is {shown(value)}"
        raise ConfigError(f"{name}: {found}; must be text, or a list of one message of the assistant")
    return value
