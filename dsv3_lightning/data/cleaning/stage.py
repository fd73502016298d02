"""The first stage of cleaning, in tasks: files of one source to kept documents with their hashes and signatures.

    SOURCE-KEY/NNNNN/documents.jsonl.zst   the kept documents, as {"text": ...}: a text or a list of messages
    SOURCE-KEY/NNNNN/digests.npy           for exact duplicates: uint64 [documents, 2]
    SOURCE-KEY/NNNNN/signatures.npy        for near duplicates: uint32 [documents, buckets · rows]
    SOURCE-KEY/NNNNN/sizes.npy             UTF-8 bytes of each document: int64 [documents]
    SOURCE-KEY/NNNNN/dropped.jsonl.zst     only with keep_dropped: {"reason": ..., "text": ...}

The key is that of the files' content and of the settings that decide, so that another source doesn't do this one again.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from dsv3_lightning.common.files import digest as digest_of
from dsv3_lightning.common.json_files import shown
from dsv3_lightning.data.cleaning import words
from dsv3_lightning.data.cleaning.config import CleaningConfig
from dsv3_lightning.data.cleaning.contamination import Contamination
from dsv3_lightning.data.cleaning.duplicates import digest
from dsv3_lightning.data.cleaning.minhash import signatures
from dsv3_lightning.data.cleaning.steps import Document, Found, clean_batch
from dsv3_lightning.data.cleaning.words import ngrams, words_of
from dsv3_lightning.data.config import SourceConfig
from dsv3_lightning.data.stages.tasks import Advance, Counts, Task
from dsv3_lightning.data.text.conversation import Message
from dsv3_lightning.data.text.corpus import read_documents
from dsv3_lightning.data.text.sources import Source
from dsv3_lightning.data.text.tally import ReadStats

FORMAT = 2  # of the files, and of what the steps decide
TASK_BYTES = 32 << 20  # of input files
BATCH = 1 << 20  # characters that are cleaned together
LEVEL = 3  # of zstandard
EXAMPLES = 3  # of each reason, in the counts of a task


@dataclass(frozen=True)
class CleanWork:
    """What a task needs besides its files' numbers. most_bytes: data.max_document_bytes. files: those of the source,
    where they are now.
    """

    source: SourceConfig
    cleaning: CleaningConfig
    text_key: str
    skip_bad_lines: bool
    most_bytes: int
    files: list[Source]


def cut(files: Sequence[tuple[str, int, str]]) -> list[Task]:
    """Tasks of whole files in their order, each of at most TASK_BYTES or one file.

    files: name, bytes, sha256. A task has them after each file's number in the source.
    """
    tasks: list[Task] = []
    size = TASK_BYTES + 1
    for number, (name, count, sha256) in enumerate(files):
        if size + count > TASK_BYTES:
            tasks.append({"files": []})
            size = 0
        tasks[-1]["files"].append([number, name, count, sha256])
        size += count
    return tasks


def decisive(work: CleanWork, sets: Sequence[str]) -> dict[str, Any]:
    """The settings that decide what a task writes. sets: sha256 of the evaluation sets."""
    cleaning = asdict(work.cleaning)
    cleaning |= {"decontaminate": cleaning["decontaminate"] and {**cleaning["decontaminate"], "paths": list(sets)}}
    for name in ("exact", "scope"):  # of the join
        del cleaning[name]
    cleaning["quality"] = {
        name: rules for name, rules in cleaning["quality"].items() if name.startswith(str(work.source.filters))
    }
    return {
        "format": FORMAT,
        "words": words.VERSION,
        "language": work.source.language,
        "kind": work.source.kind,
        "tokenizer": work.source.tokenizer and digest_of(Path(work.source.tokenizer)),
        "filters": work.source.filters,
        "text_key": work.text_key,
        "skip_bad_lines": work.skip_bad_lines,
        "max_document_bytes": work.most_bytes,
        "cleaning": cleaning,
    }


def clean_task(work: CleanWork, keep_dropped: bool, task: Task, folder: Path, advance: Advance) -> Counts:
    """Cleans the files of a task; see the module for what it writes. Raises ConfigError that names a file."""
    stats, tally = ReadStats(), Tally()
    files = [work.files[number] for number, *_ in task["files"]]
    contamination = contamination_of(work.cleaning)
    near = work.cleaning.near
    digests, sizes, signed = [], [], []
    with ExitStack() as stack:
        write = stack.enter_context(documents_writer(folder / "documents.jsonl.zst"))
        drop = stack.enter_context(documents_writer(folder / "dropped.jsonl.zst")) if keep_dropped else None
        for batch in batches(reading(files, work, stats, advance)):
            documents = clean_batch(batch, work.source, work.cleaning, contamination)
            kept = [document for document in documents if document.reason is None]
            for given, document in zip(batch, documents):
                tally.add(given, document)
                if document.reason is not None and drop is not None:
                    drop({"reason": document.reason, "text": written(given)})
            texts = [document.text for document in kept]
            for document, text in zip(kept, texts):
                write({"text": written(document.found)})
                digests.append(digest(text if isinstance(document.found, str) else spoken(document.found)))
                sizes.append(len(text.encode()))
            if near is not None:
                grams, bounds = ngrams(words_of(texts), near.ngram)
                signed.append(signatures(grams, bounds, near.buckets * near.rows))
    np.save(folder / "digests.npy", np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2))
    np.save(folder / "sizes.npy", np.array(sizes, np.int64))
    if near is not None:
        empty = np.empty((0, near.buckets * near.rows), np.uint32)
        np.save(folder / "signatures.npy", np.concatenate([empty, *signed]))
    return {"input_bytes": sum(size for _, _, size, _ in task["files"]), **tally.facts(), **stats.facts()}


def reading(files: Sequence[Source], work: CleanWork, stats: ReadStats, advance: Advance) -> Iterator[Found]:
    for file in files:
        yield from read_documents([file], work.text_key, stats, work.skip_bad_lines, work.most_bytes)
        advance(file.path.stat().st_size)


def batches(documents: Iterable[Found]) -> Iterator[list[Found]]:
    """Yields lists of documents of BATCH characters or a little more."""
    batch: list[Found] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document) if isinstance(document, str) else sum(len(message.text) for message in document)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def contamination_of(cleaning: CleaningConfig) -> Contamination | None:
    given = cleaning.decontaminate
    return None if given is None else read_sets(tuple(given.paths), given.ngram, given.cjk_ngram)


@cache
def read_sets(paths: tuple[str, ...], ngram: int, cjk_ngram: int) -> Contamination:
    return Contamination.of_files(paths, ngram, cjk_ngram)


@contextmanager
def documents_writer(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields a function that writes one record as a line of a .jsonl.zst file."""
    with open(path, "wb") as file, zstandard.ZstdCompressor(LEVEL).stream_writer(file, closefd=False) as stream:

        def write(record: dict[str, Any]) -> None:
            stream.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")

        yield write


class Tally:
    """Documents and bytes by what happened to them, with examples."""

    def __init__(self) -> None:
        self.documents: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self.languages: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, given: Found, document: Document) -> None:
        size = len(document.text.encode())
        for what in ("read", document.reason or "kept"):
            self.documents[what] += 1
            self.bytes[what] += len(Document(given).text.encode()) if what == "read" else size
        self.changed.update(document.changed)
        self.languages[document.language or "unknown"] += 1
        known = self.examples.setdefault(document.reason or "kept", [])
        if len(known) < EXAMPLES:
            known.append(shown(document.text[:400], 200))

    def facts(self) -> dict[str, Any]:
        named = ("documents", "bytes", "changed", "languages")
        return {name: dict(sorted(getattr(self, name).items())) for name in named} | {"examples": self.examples}


def written(found: Found) -> Any:
    """A document as `read_documents` reads it again."""
    if isinstance(found, str):
        return found
    marks = [{"weight": int(message.learned)} if message.role == "assistant" else {} for message in found]
    return [{"role": message.role, "content": message.text, **mark} for message, mark in zip(found, marks)]


def spoken(found: list[Message]) -> str:
    return json.dumps([[message.role, message.text] for message in found])
