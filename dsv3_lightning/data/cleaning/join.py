"""The second stage of cleaning: duplicates over all tasks of the first, or within each source.

    join-KEY/NNNNN/SOURCE-NNNNN.npy       why each document of a task of the first stage is dropped: uint8 [documents]:
                                          0 it stays, 1 an earlier one equals it, 2 an earlier one is similar
    join-KEY/NNNNN/dropped.jsonl.zst      only with keep_dropped

One task for all sources, or one for each. Memory: about 60 bytes for each document.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv3_lightning.common.json_files import shown
from dsv3_lightning.data.cleaning.config import CleaningConfig
from dsv3_lightning.data.cleaning.duplicates import repeated, similar
from dsv3_lightning.data.cleaning.minhash import bucket_keys
from dsv3_lightning.data.cleaning.stage import EXAMPLES, documents_writer, written
from dsv3_lightning.data.stages.tasks import Advance, Counts, Task
from dsv3_lightning.data.text.corpus import read_documents
from dsv3_lightning.data.text.sources import Source

FORMAT = 1
STAYS, EXACT, NEAR = range(3)
REASONS = ("stays", "exact", "near")


class Part(NamedTuple):
    """A finished task of the first stage. name: SOURCE-NNNNN. folder: with its files."""

    source: str
    name: str
    folder: Path


def part_name(source: str, number: int) -> str:
    return f"{source}-{number:05}"


def decisive(cleaning: CleaningConfig) -> dict[str, Any]:
    """The settings that decide what is marked, besides those of the first stage."""
    near = cleaning.near and [cleaning.near.buckets, cleaning.near.rows]
    return {"format": FORMAT, "exact": cleaning.exact, "near": near}


def join_task(
    cleaning: CleaningConfig, known: dict[str, Part], keep_dropped: bool, task: Task, folder: Path, advance: Advance
) -> Counts:
    """Marks the duplicates of a task's parts; returns for each source its documents and bytes by reason.

    known: all parts by name.
    """
    parts = [known[name] for name in task["parts"]]
    sizes = [np.load(part.folder / "sizes.npy") for part in parts]
    ends = np.cumsum([len(size) for size in sizes])
    marks = np.split(marked(parts, cleaning), ends[:-1])
    counts: dict[str, Any] = {}
    for part, mark, size in zip(parts, marks, sizes):
        np.save(folder / f"{part.name}.npy", mark)
        of_source = counts.setdefault(part.source, {"documents": {}, "bytes": {}, "examples": {}})
        for code, reason in enumerate(REASONS):
            if (mark == code).any():
                add(of_source["documents"], reason, int((mark == code).sum()))
                add(of_source["bytes"], reason, int(size[mark == code].sum()))
        add_examples(part, mark, of_source["examples"])
        advance(int(size.sum()))
    if keep_dropped:
        with documents_writer(folder / "dropped.jsonl.zst") as write:
            for part, mark in zip(parts, marks):
                for document, code in zip(read_documents([documents_of(part)], "text"), mark):
                    if code != STAYS:
                        write({"source": part.source, "reason": REASONS[code], "text": written(document)})
    return {"sources": counts}


def add(counts: dict[str, int], reason: str, number: int) -> None:
    counts[reason] = counts.get(reason, 0) + number


def add_examples(part: Part, mark: np.ndarray, examples: dict[str, list[str]]) -> None:
    """Adds the beginnings of the first documents that are dropped."""
    if all(len(examples.get(REASONS[code], [])) >= EXAMPLES for code in np.unique(mark[mark != STAYS])):
        return
    last = max(int(np.flatnonzero(mark == code)[:EXAMPLES][-1]) for code in np.unique(mark[mark != STAYS]))
    for document, code in zip(read_documents([documents_of(part)], "text"), mark[: last + 1]):
        known = examples.setdefault(REASONS[code], []) if code != STAYS else []
        if code != STAYS and len(known) < EXAMPLES:
            text = document if isinstance(document, str) else "\n".join(message.text for message in document)
            known.append(shown(text[:400], 200))


def documents_of(part: Part, keep: Path | None = None) -> Source:
    """The documents of a part as a file of the corpus. keep: the join's marks."""
    return Source(
        f"{part.name}.jsonl.zst", part.folder / "documents.jsonl.zst", part.source, "text",
        f"data.sources.{part.source}", marks=keep,
    )  # fmt: skip


def marked(parts: Sequence[Part], cleaning: CleaningConfig) -> np.ndarray:
    """Why each document is dropped: uint8 [documents of all parts]."""
    digests = np.concatenate([np.load(part.folder / "digests.npy") for part in parts])
    marks = np.zeros(len(digests), np.uint8)
    if cleaning.exact:
        marks[repeated(digests)] = EXACT
    near = cleaning.near
    if near is not None:
        signatures = [np.load(part.folder / "signatures.npy", mmap_mode="r") for part in parts]

        def keys_of(bucket: int) -> np.ndarray:
            keys = np.concatenate([bucket_keys(rows, bucket, near.rows) for rows in signatures])
            keys[marks == EXACT] = 0
            return keys

        marks[similar(keys_of, near.buckets)] = NEAR
    return marks
