"""Lines of jsonl files as pairs of answers or as prompts, in tokens. Imports no torch.

A line has a `prompt` or `messages`. Text under `prompt` is continued as it is; a list of messages, under either name,
is a conversation that ends with the user's turn, in the format of data/text/conversation.py. A pair's line also has
`chosen` and `rejected`: text, or the assistant's message alone in a list, as TRL's files have it.
"""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from dsv3_lightning.data.config import DataConfig
from dsv3_lightning.data.text.conversation import conversation, turn_ids
from dsv3_lightning.data.text.corpus import BOM, BadLines, lines_of, refuse_other_layouts
from dsv3_lightning.data.text.messages import parse_message, short
from dsv3_lightning.data.text.sources import LINE_SUFFIXES, Source, find_sources, unreadable
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError

PROMPTS = ("prompt", "messages")


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
            for number, text in numbered(source):
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


def files_of(config: DataConfig) -> list[Source]:
    """The jsonl files of data.paths. Raises ConfigError."""
    if not config.paths:
        raise ConfigError("data.paths=[]: must name a .jsonl file of prompts or pairs")
    sources = find_sources(config.paths)
    for source in sources:
        if not source.path.name.lower().endswith(LINE_SUFFIXES):
            raise ConfigError(f"{source.where}: must be a .jsonl file, also as .gz or .zst")
    return sources


def numbered(source: Source) -> Iterator[tuple[int, str]]:
    """The lines that aren't blank, with their numbers. Raises ConfigError for another kind of file."""
    first = True
    for number, line in enumerate(lines_of(source.path), 1):
        line = line.removeprefix(BOM) if number == 1 else line
        if line.strip():
            if first:
                refuse_other_layouts(source, line)
            first = False
            yield number, line.decode(errors="replace")


def parse(text: str, tokenizer: Tokenizer, pairs: bool) -> Line:
    """Raises ConfigError without file and line."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ConfigError(f"not an object but {short(record)}")
    names = [name for name in PROMPTS if name in record]
    if len(names) != 1:
        raise ConfigError(f"must have either prompt or messages; the line has {', '.join(record) or 'no keys'}")
    prompt, shown = prompt_of(record[names[0]], names[0], tokenizer)
    taken = {names[0]}
    answers = []
    if pairs:
        answers = [[*tokenizer.encode(answer_of(record, name)), tokenizer.eos_id] for name in ("chosen", "rejected")]
        taken |= {"chosen", "rejected"}
        if answers[0] == answers[1]:
            raise ConfigError("chosen and rejected are the same")
    return Line(prompt, answers, shown, {name: value for name, value in record.items() if name not in taken})


def prompt_of(value: Any, name: str, tokenizer: Tokenizer) -> tuple[list[int], str | list[dict[str, str]]]:
    if isinstance(value, str) and name == "prompt":
        return [tokenizer.bos_id, *tokenizer.encode(value)], value
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{name}={short(value)}: must be {'text or ' if name == 'prompt' else ''}a list of messages")
    messages = [parse_message(message, number, f"{name}[{number}]", Counter()) for number, message in enumerate(value)]
    if messages[-1].role != "user":
        raise ConfigError(f"{name}: must end with a message of the user, which the answer follows")
    written = conversation(tokenizer, [(one.role, tokenizer.encode(one.text)) for one in messages])
    ids = [*written.ids, turn_ids(tokenizer)[1]]
    return ids, [{"role": one.role, "content": one.text} for one in messages]


def answer_of(record: dict[str, Any], name: str) -> str:
    """The text of an answer. Raises ConfigError."""
    value = record.get(name)
    if isinstance(value, list) and len(value) == 1:
        message = parse_message(value[0], 1, f"{name}[0]", Counter())
        if message.role == "assistant":
            return message.text
    if not isinstance(value, str):
        found = "is missing" if name not in record else f"is {short(value)}"
        raise ConfigError(f"{name}: {found}; must be text, or a list of one message of the assistant")
    return value
