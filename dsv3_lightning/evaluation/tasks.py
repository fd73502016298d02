"""Tasks: jsonl files of questions with ranked options, or with answers to generate. Imports no torch.

A line is {"context", "continuations", "label"}; or {"contexts", "continuation", "label"}, where the options are what
stands before the same text (partial evaluation, as in WinoGrande); or {"prompt", "answer"} with an optional "gold", the
text whose bits per byte are measured (default: the answer). The first line may hold the task's settings, {"task": NAME,
...}. Lines with "example": true are few-shot examples only; without such lines, the other questions are the examples.
"""

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from dsv3_lightning.common.json_files import parse_object, read_text, shown
from dsv3_lightning.common.paths import display_path, user_path
from dsv3_lightning.common.wording import nearest
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.evaluation.answers import check_expected
from dsv3_lightning.evaluation.protocols import protocol_of


@dataclass(frozen=True)
class Settings:
    """The settings of a task, with their names in its first line.

    task: its name. checker: who reads generated answers (answers.CHECKERS). protocol: how they are generated.
    shots: few-shot examples before each question. stop: texts before which an answer ends. chat: True writes questions
    as turns of a conversation. unconditional: the context for normalizing options by log p(option | context).
    license: that of the data. max_new_tokens: 0 takes the protocol's.
    """

    task: str = ""
    checker: str = "text"
    protocol: str = "greedy"
    shots: int = 0
    stop: tuple[str, ...] = ()
    chat: bool = False
    unconditional: str = "Answer:"
    license: str = ""
    max_new_tokens: int = 0


@dataclass(frozen=True)
class Sample:
    """A question. number: its place in the file. continuations: the options, none where an answer is generated.

    contexts: that of each option where they differ; the continuations are then equal, and context is the right one.
    answers: those that are accepted. gold: the right continuation of the context, or the expected text.
    """

    number: int
    context: str
    gold: str
    continuations: tuple[str, ...] = ()
    label: int = -1
    answers: tuple[str, ...] = ()
    unconditional: str | None = None
    contexts: tuple[str, ...] = ()

    def before(self, option: int) -> "Sample":
        """The question with the context of an option."""
        return replace(self, context=self.contexts[option]) if self.contexts else self


@dataclass(frozen=True)
class Task:
    """A task's file, read. sha256: that of the file. examples: the questions that few-shot examples are drawn from."""

    settings: Settings
    kind: Literal["options", "generation"]
    samples: tuple[Sample, ...]
    examples: tuple[Sample, ...]
    sha256: str

    @property
    def name(self) -> str:
        return self.settings.task

    def shots_of(self, sample: Sample, seed: int) -> list[Sample]:
        """The examples before a question, never the question itself; they depend on the seed and its number alone."""
        others = [one for one in self.examples if one.number != sample.number]
        return random.Random(f"{seed} {sample.number}").sample(others, self.settings.shots)


def read_task(path: Path, **changes: Any) -> Task:
    """Reads a task's file. changes: settings that replace those of the file. Raises ConfigError with file and line."""
    text = read_text(path)
    settings = Settings(task=path.name.split(".")[0])
    samples: list[Sample] = []
    examples: list[Sample] = []
    kinds = set()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            content = parse_object(line)
            if "task" in content and not samples and not examples:
                settings = read_settings(content, settings)
                continue
            sample = read_sample(content, number, settings)
        except ConfigError as error:
            raise ConfigError(f"{display_path(path)}:{number}: {error}") from error
        kinds.add("options" if sample.continuations else "generation")
        (examples if content.get("example") is True else samples).append(sample)
    if not samples:
        raise ConfigError(f"{display_path(path)}: holds no question")
    if len(kinds) > 1:
        raise ConfigError(
            f"{display_path(path)}: mixes questions with `continuations` and with `answer`; use two files"
        )
    settings = replace(settings, **{name: value for name, value in changes.items() if value is not None})
    protocol_of(settings.protocol)
    pool = tuple(examples or samples)
    most = len(pool) - (not examples)
    if settings.shots > most:
        raise ConfigError(f"{display_path(path)}: shots={settings.shots}: there are {most} questions for examples")
    kind: Any = kinds.pop()
    return Task(settings, kind, tuple(samples), pool, hashlib.sha256(text.encode()).hexdigest())


def read_settings(content: dict[str, Any], settings: Settings) -> Settings:
    """The settings of a first line. A single stop text stands for a list of one. Raises ConfigError."""
    known = {field.name: type(getattr(settings, field.name)) for field in fields(Settings)}
    for name, value in content.items():
        if name not in known:
            raise ConfigError(f"{name}: no such setting{nearest(name, known)}")
        if name == "stop":
            value = [value] if isinstance(value, str) else value
            if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
                raise ConfigError(f"stop={shown(value)}: must be a list of texts that aren't empty")
            value = tuple(value)
        if type(value) is not known[name] or isinstance(value, int) and value < 0:
            raise ConfigError(f"{name}={shown(value)}: must be {wanted(known[name])}")
        if name == "task" and not re.fullmatch(r"[\w.-]+", value):
            raise ConfigError(f"task={shown(value)}: must be letters, digits, _, . and -, as results are files")
        settings = replace(settings, **{name: value})
    return settings


def wanted(kind: type) -> str:
    return {str: "text", int: "a whole number of at least 0", bool: "true or false"}[kind]


def read_sample(content: dict[str, Any], number: int, settings: Settings) -> Sample:
    """A question. Raises ConfigError that names the field."""
    given = content.get("unconditional")
    if given is not None and not isinstance(given, str):
        raise ConfigError(f"unconditional={shown(given)}: must be text")
    if "contexts" in content:
        contexts, label = read_options(content, "contexts")
        text = text_of(content, "continuation")
        if not text:
            raise ConfigError("continuation: must not be empty")
        return Sample(number, contexts[label], text, (text,) * len(contexts), label, (), given, contexts)
    if "continuations" in content:
        options, label = read_options(content, "continuations")
        return Sample(number, text_of(content, "context"), options[label], options, label, (), given)
    context, answers = text_of(content, "prompt"), content.get("answer")
    accepted = [answers] if isinstance(answers, str) else answers
    if not isinstance(accepted, list) or not all(isinstance(answer, str) for answer in accepted):
        raise ConfigError(f"answer={shown(answers)}: must be text, or a list of accepted texts")
    check_expected(settings.checker, accepted)
    gold = text_of(content, "gold") if "gold" in content else accepted[0]
    return Sample(number, context, gold, answers=tuple(accepted))


def read_options(content: dict[str, Any], name: str) -> tuple[tuple[str, ...], int]:
    """The options of a question and the number of the right one. Raises ConfigError."""
    options, label = content[name], content.get("label")
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(one, str) and one for one in options):
        raise ConfigError(f"{name}={shown(options)}: must be a list of at least two texts that aren't empty")
    if type(label) is not int or not 0 <= label < len(options):
        raise ConfigError(f"label={shown(label)}: must be the number of an option, from 0 to {len(options) - 1}")
    if len(set(options)) < len(options):
        raise ConfigError(f"{name}={shown(options)}: two options are equal")
    return tuple(options), label


def text_of(content: dict[str, Any], name: str) -> str:
    value = content.get(name)
    if not isinstance(value, str):
        raise ConfigError(f"{name}={shown(value)}: must be text")
    return value


def read_tasks(paths: Sequence[Path], **changes: Any) -> list[Task]:
    """Tasks with different names. changes: as in `read_task`. Raises ConfigError."""
    tasks: list[Task] = []
    for path in paths:
        task = read_task(path, **changes)
        if task.name in {one.name for one in tasks}:
            raise ConfigError(f"task {task.name}: given twice; results are kept by name")
        tasks.append(task)
    return tasks


def find_tasks(names: Sequence[str], folder: Path, **changes: Any) -> list[Task]:
    """Tasks by path, or by name in the folder of fetched tasks. Raises ConfigError."""
    paths = []
    for name in names:
        path = user_path(name)
        if not path.is_file():
            path = folder / f"{name}.jsonl"
        if not path.is_file():
            found = sorted(file.stem for file in folder.glob("*.jsonl"))
            hint = nearest(name, found) if found else "; `dsv3 eval fetch` brings public ones"
            raise ConfigError(f"task {name}: no such file, nor {display_path(path)}{hint}")
        paths.append(path)
    return read_tasks(paths, **changes)
