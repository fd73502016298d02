"""The documents of a corpus, and the tasks that a preparation reads them in. Imports no torch."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from dsv3_lightning.data.config import DataConfig
from dsv3_lightning.data.text.conversation import Message
from dsv3_lightning.data.text.corpus import read_documents
from dsv3_lightning.data.text.sources import Source, main_origins
from dsv3_lightning.data.text.tally import ReadStats

HASHES = 1 << 64
TASK_BYTES = 1 << 26  # of text that a task reads; a larger compressed file or text stays whole
PACKED_BY = 4  # bytes of text for each in a compressed file, about


class Document(NamedTuple):
    """A text or a conversation with its hash below HASHES, which is the same in every process and on every machine.

    texts: the text, or that of each message. learned: the messages that are trained on. size: UTF-8 bytes of all texts.
    loss_text: UTF-8 bytes that are trained on. origin: index into the manifest's `origins`.
    """

    roles: list[str] | None
    texts: list[str]
    learned: list[bool]
    size: int
    loss_text: bytes
    hash: int
    origin: int

    @classmethod
    def of(cls, found: str | list[Message], origin: int) -> "Document":
        if isinstance(found, str):
            utf8 = found.encode()
            return cls(None, [found], [], len(utf8), utf8, hash_of(utf8), origin)
        roles, texts = [message.role for message in found], [message.text for message in found]
        learned = [message.learned for message in found if message.role == "assistant"]
        loss_text = "".join(message.text for message in found if message.learned).encode()
        size = sum(len(text.encode()) for text in texts)
        said = json.dumps(list(zip(roles, texts)))  # without `learned`, so that it stays on the same side of the split
        return cls(roles, texts, learned, size, loss_text, hash_of(said.encode()), origin)


def hash_of(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


class Corpus(Protocol):
    """What a preparation reads: tasks, each of some documents, which any process reads in the same order."""

    @property
    def origins(self) -> list[str]:
        """Names of the documents' origins."""

    def tasks(self) -> list[dict[str, Any]]:
        """Descriptions as JSON, which don't depend on where the files are, nor on the machine."""

    def read(self, task: dict[str, Any], stats: ReadStats | None = None) -> Iterator[Document]:
        """Yields a task's documents. stats: counts what was read and left out. Raises ConfigError."""


@dataclass(frozen=True)
class Files:
    """The corpus of files as they are. origins: their names, the largest first and `others` last."""

    sources: list[Source]
    text_key: str
    skip_bad_lines: bool
    most_bytes: int
    names: dict[str, str]

    @classmethod
    def of(cls, sources: list[Source], config: DataConfig) -> "Files":
        return cls(
            sources, config.text_key, config.skip_bad_lines, config.max_document_bytes, main_origins(sources)
        )  # fmt: skip

    @property
    def origins(self) -> list[str]:
        return list(dict.fromkeys(self.names.values()))

    def tasks(self) -> list[dict[str, Any]]:
        """Pieces of files in their order: the source's number, and the bytes from which to which lines begin."""
        return cut_tasks(self.sources, [source.path.stat().st_size for source in self.sources], TASK_BYTES)

    def read(self, task: dict[str, Any], stats: ReadStats | None = None) -> Iterator[Document]:
        numbers = {name: number for number, name in enumerate(self.origins)}
        for number, begin, end in task["pieces"]:
            source = self.sources[number]._replace(begin=begin, end=end)
            for found in read_documents([source], self.text_key, stats, self.skip_bad_lines, self.most_bytes):
                yield Document.of(found, numbers[self.names[source.origin]])


def cut_tasks(sources: Sequence[Source], sizes: Sequence[int], most: int) -> list[dict[str, Any]]:
    """Tasks of at most about `most` bytes of text, from files of these sizes; only plain files of lines are cut."""
    tasks: list[dict[str, Any]] = []
    pieces: list[list[int | None]] = []
    held = 0
    for number, (source, size) in enumerate(zip(sources, sizes, strict=True)):
        name = source.path.name.lower()
        cut = most if name.endswith(".jsonl") and source.kind in (None, "jsonl") else size
        text = PACKED_BY if name.endswith((".gz", ".zst")) else 1
        for begin in range(0, max(size, 1), max(cut, 1)):
            part = min(cut, size - begin)
            if pieces and held + part * text > most:
                tasks.append({"pieces": pieces, "bytes": held})
                pieces, held = [], 0
            pieces.append([number, begin, None if begin + part == size else begin + part])
            held += part * text
    return [*tasks, {"pieces": pieces, "bytes": held}]
