"""The last stage: the pieces that the tasks encoded, put together to shards of bounded size. Imports no torch."""

import hashlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_lightning.common.files import FileRecord, blocks, link_or_copy
from dsv3_lightning.data.stages.tasks import Advance, Counts, Task, record_file, task_folder
from dsv3_lightning.data.text.encoding import SPLITS
from dsv3_lightning.data.text.store import join_span, mapped, shard_name, write_tables

ENDS = (".bin", ".idx", ".src", ".ans")


def merge_tasks(encoded: Sequence[Counts], shard_bytes: int) -> list[Task]:
    """The shards to make: consecutive pieces, as many as fit into one. encoded: what the encoding's tasks counted."""
    tasks: list[Task] = []
    for split in SPLITS:
        groups: list[list[list[Any]]] = [[]]
        held = 0
        for number, counts in enumerate(encoded):
            for name, file in sorted(counts["files"].items()):
                if not name.startswith(f"{split}/") or not name.endswith(".bin") or not file["bytes"]:
                    continue
                if groups[-1] and held + file["bytes"] > shard_bytes:
                    groups.append([])
                    held = 0
                groups[-1].append([number, name.removesuffix(".bin")])
                held += file["bytes"]
        tasks += [{"shard": shard_name(split, place), "pieces": group} for place, group in enumerate(groups)]
    return tasks


def merge_task(task: Task, folder: Path, advance: Advance, *, encoded: Path, dtype: str) -> Counts:
    """Makes a shard of one or more pieces. encoded: the folder of the encoding's tasks."""
    name = task["shard"]
    (folder / name).parent.mkdir()
    pieces = [task_folder(encoded, number) / piece for number, piece in task["pieces"]]
    if len(pieces) == 1:
        files = {}
        for end in ENDS:
            if (path := pieces[0].with_name(pieces[0].name + end)).exists():
                link_or_copy(path, folder / (name + end))
                files[name + end] = record_file(path)
        return {"files": files}
    width, begin = np.dtype(dtype).itemsize, 0
    sha256, offsets, origins, spans = hashlib.sha256(), [np.zeros(1, np.int64)], [], array("Q")
    with open(folder / f"{name}.bin", "wb") as file:
        for piece in pieces:
            size = 0
            for block in blocks(piece.with_name(f"{piece.name}.bin")):
                file.write(block)
                sha256.update(block)
                size += len(block)
            offsets.append(mapped(piece.with_name(f"{piece.name}.idx"), "<i8")[1:] + begin)
            origins.append(mapped(piece.with_name(f"{piece.name}.src"), "<u2"))
            answers = piece.with_name(f"{piece.name}.ans")
            bounds = mapped(answers, "<i8") if answers.exists() else np.array([0, size // width])
            for first, last in (bounds + begin).reshape(-1, 2).tolist():
                join_span(spans, first, last)
            begin += size // width
    record: FileRecord = {"bytes": begin * width, "sha256": sha256.hexdigest()}
    no_origins = np.empty(0, np.uint16)
    tables = np.concatenate(offsets), np.concatenate([no_origins, *origins]), np.frombuffer(spans, np.uint64)
    return {"files": {f"{name}.bin": record, **write_tables(folder, name, *tables)}}
