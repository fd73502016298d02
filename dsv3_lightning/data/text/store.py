"""Token files: the tokenized documents on disk in shards, memory-mapped. Imports no torch.

    SPLIT/00000.bin  the ids of the documents, each BOS ... EOS; uint16 where the tokenizer fits into it, else uint32
    SPLIT/00000.idx  where each document begins in the .bin, and the end: uint64 [documents + 1]
    SPLIT/00000.src  the origin of each document, as an index into the manifest's `origins`: uint16 [documents]
    SPLIT/00000.ans  only with conversations: begin and end of each span of tokens that are trained on, alternating:
                     uint64 [2 · spans], rising; a shard without it is trained on whole
    SPLIT/00001.bin  … the next shard; a .bin is at most of `data.shard_bytes`, unless a single document is larger
    manifest.json    width, counts, and bytes and sha256 of every file; written last

All little-endian. No document crosses shards. Document boundaries are stored, not inferred from EOS, which a document
may lack or contain twice.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_lightning.common.files import FileRecord, write_file
from dsv3_lightning.common.strict_json import strict_json
from dsv3_lightning.errors import ConfigError

FORMAT = 3
MANIFEST = "manifest.json"
OPEN_SHARDS = 256
FLUSH = 1 << 18  # tokens that are written together


class TokenWriter:
    """Writes one split: `add` documents, then `close`. Raises ConfigError for an id that the tokenizer doesn't have.

    shard_bytes: the most that a .bin holds, but for a larger document; None: no limit.
    """

    def __init__(
        self, folder: Path, split: str, vocab_size: int, bos_id: int, eos_id: int, shard_bytes: int | None = None
    ) -> None:
        (folder / split).mkdir()
        self.folder, self.split, self.vocab_size, self.shard_bytes = folder, split, vocab_size, shard_bytes
        self.bos, self.eos = np.array([bos_id], np.uint32), np.array([eos_id], np.uint32)
        self.dtype = token_dtype(vocab_size)
        self.width = np.dtype(self.dtype).itemsize
        self.waiting: list[np.ndarray] = []
        self.waiting_tokens = 0
        self.documents = self.tokens = 0
        self.files: dict[str, FileRecord] = {}
        self.shards = 0
        self._begin_shard()

    def add(self, ids: np.ndarray, origin: int = 0) -> None:
        """Adds a document's ids [n], any integer type, without BOS and EOS. origin: index of its origin."""
        self._add([self.bos, ids, self.eos], len(ids) + 2, [(0, len(ids) + 2)], origin)

    def add_whole(self, document: np.ndarray, loss_spans: list[tuple[int, int]], origin: int) -> None:
        """Adds a document including BOS and EOS. loss_spans: (begin, end) of the spans that are trained on."""
        self._add([document], len(document), loss_spans, origin)

    def _add(self, parts: list[np.ndarray], size: int, loss_spans: list[tuple[int, int]], origin: int) -> None:
        held = self.offsets[-1]
        if self.shard_bytes is not None and held and (held + size) * self.width > self.shard_bytes:
            self._end_shard()
            self._begin_shard()
            held = 0
        self.waiting += parts
        self.waiting_tokens += size
        if self.waiting_tokens >= FLUSH:
            self._write()
        for begin, end in loss_spans:
            join_span(self.loss_spans, held + begin, held + end)
        self.offsets.append(held + size)
        self.origins.append(origin)
        self.documents, self.tokens = self.documents + 1, self.tokens + size

    def _write(self) -> None:
        """Writes the ids that wait. Raises ConfigError."""
        if not self.waiting:
            return
        ids = np.concatenate(self.waiting)
        if ids.min() < 0 or ids.max() >= self.vocab_size:  # a cast would wrap silently
            wrong = ids.max() if ids.min() >= 0 else ids.min()
            raise ConfigError(f"data.tokenizer: token id {wrong} is not below the vocabulary's size {self.vocab_size}")
        content = ids.astype(self.dtype).tobytes()
        self.file.write(content)
        self.sha256.update(content)
        self.waiting, self.waiting_tokens = [], 0

    def close(self) -> dict[str, FileRecord]:
        """Syncs everything to disk; returns the split's files by their path below the folder."""
        self._end_shard()
        return self.files

    def _begin_shard(self) -> None:
        self.offsets, self.origins, self.loss_spans = array("Q", [0]), array("H"), array("Q")
        self.sha256 = hashlib.sha256()
        self.name = shard_name(self.split, self.shards)
        self.file = open(self.folder / f"{self.name}.bin", "wb")
        self.shards += 1

    def _end_shard(self) -> None:
        self._write()
        self.file.flush()
        os.fsync(self.file.fileno())
        size = self.file.tell()
        self.file.close()
        self.files[f"{self.name}.bin"] = {"bytes": size, "sha256": self.sha256.hexdigest()}
        offsets, origins, spans = (np.frombuffer(part, part.typecode) for part in
                                   (self.offsets, self.origins, self.loss_spans))  # fmt: skip
        self.files |= write_tables(self.folder, self.name, offsets, origins, spans)


def write_tables(
    folder: Path, name: str, offsets: np.ndarray, origins: np.ndarray, loss_spans: np.ndarray
) -> dict[str, FileRecord]:
    """Writes what belongs to a shard's .bin; returns the files. name: SPLIT/NNNNN."""
    content = {".idx": offsets.astype("<u8"), ".src": origins.astype("<u2")}
    if loss_spans.tolist() not in ([], [0, offsets[-1]]):
        content[".ans"] = loss_spans.astype("<u8")
    return {name + end: write_file(folder / (name + end), numbers.tobytes()) for end, numbers in content.items()}


def join_span(spans: "array[int]", begin: int, end: int) -> None:
    """Adds a span after the others, or to the last one if it continues that, as texts always do."""
    if spans and spans[-1] == begin:
        spans.pop()
    else:
        spans.append(begin)
    spans.append(end)


def shard_name(split: str, number: int) -> str:
    return f"{split}/{number:05}"


class TokenFile:
    """A memory-mapped split of one or more shards. tokens: all ids [N] uint16 or uint32. Pickled as its path."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        self.manifest = read_manifest(folder)
        self.names = shards_of(self.manifest, split)
        self.dtype = np.dtype(self.manifest["dtype"])
        sizes = [self.manifest["files"][f"{name}.bin"]["bytes"] // self.dtype.itemsize for name in self.names]
        self.begins = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])  # of each shard in the split's tokens
        self.tokens: np.ndarray | ShardedTokens
        if len(self.names) == 1:
            self.tokens = self._mapped(0, ".bin", self.manifest["dtype"])
        else:
            self.tokens = ShardedTokens([folder / f"{name}.bin" for name in self.names], self.begins, self.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenFile, (self.folder, self.split)

    @property
    def documents(self) -> int:
        return sum(self.manifest["files"][f"{name}.idx"]["bytes"] // 8 - 1 for name in self.names)

    def offsets(self, make: Callable[[str, tuple[int, ...], Any], np.ndarray] | None = None) -> np.ndarray:
        """The begin of each document, and the end of the last: int64 [documents + 1]. Of several shards a new array.

        make: name, shape and dtype to the new array, which may be in a file.
        """
        if len(self.names) == 1:
            return self._mapped(0, ".idx", "<i8")  # of uint64 below 2^63: the same bytes
        shape = (self.documents + 1,)
        found = np.empty(shape, np.int64) if make is None else make("offsets", shape, np.int64)
        found[0], place = 0, 1
        for number, begin in enumerate(self.begins[:-1]):
            part = self._mapped(number, ".idx", "<i8")[1:]
            np.add(part, begin, out=found[place : place + len(part)])
            place += len(part)
        return found

    def origins(self) -> np.ndarray:
        """The origin of each document, as an index into the manifest's `origins`: uint16 [documents]."""
        parts = [self._mapped(number, ".src", "<u2") for number in range(len(self.names))]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def loss_spans(self) -> np.ndarray | None:
        """Begin and end of each span of tokens that are trained on: int64 [2 · spans]; None if all tokens are."""
        if not any(f"{name}.ans" in self.manifest["files"] for name in self.names):
            return None
        parts = [self._loss_spans_of(number) for number in range(len(self.names))]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _loss_spans_of(self, number: int) -> np.ndarray:
        begin, end = self.begins[number : number + 2]
        if f"{self.names[number]}.ans" not in self.manifest["files"]:
            return np.array([begin, end]) if end > begin else np.empty(0, np.int64)
        spans = self._mapped(number, ".ans", "<i8")
        return spans + begin if begin else spans

    def _mapped(self, number: int, end: str, dtype: str) -> np.ndarray:
        return mapped(self.folder / (self.names[number] + end), dtype)


class ShardedTokens:
    """The tokens of several shards, read like one array [N] by slices and by arrays of positions.

    begins: of each shard, and the end of the last: int64 [shards + 1].
    """

    def __init__(self, paths: list[Path], begins: np.ndarray, dtype: np.dtype[Any]) -> None:
        self.paths, self.begins, self.dtype = paths, begins, dtype
        self.shard = lru_cache(maxsize=OPEN_SHARDS)(self._open)  # each holds a file handle

    def __len__(self) -> int:
        return int(self.begins[-1])

    def _open(self, number: int) -> np.ndarray:
        return mapped(self.paths[number], self.dtype.str)

    def __getitem__(self, where: slice | np.ndarray) -> np.ndarray:
        if isinstance(where, slice):
            where = np.arange(*where.indices(len(self)))
        ids = np.empty(len(where), self.dtype)
        breaks = np.flatnonzero(np.diff(where) != 1) + 1  # between runs of consecutive positions, such as documents
        firsts = np.concatenate([[0], breaks]) if len(where) else breaks
        shards = np.searchsorted(self.begins, where[firsts], "right") - 1
        ends = [*breaks.tolist(), len(where)]
        for begin, end, place, number in zip(firsts.tolist(), ends, where[firsts].tolist(), shards.tolist()):
            while begin < end:  # a run of several documents may cross shards
                offset = place - int(self.begins[number])
                part = self.shard(number)[offset : offset + end - begin]
                ids[begin : begin + len(part)] = part
                begin, place, number = begin + len(part), place + len(part), number + 1
        return ids


def mapped(path: Path, dtype: str) -> np.ndarray:
    """A memory-mapped array as a plain view, which slices several times faster than np.memmap; handles empty files."""
    return np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.empty(0, dtype)


def shards_of(manifest: dict[str, Any], split: str) -> list[str]:
    """The shards of a split, in their order, each as SPLIT/NNNNN."""
    names = (name.removesuffix(".bin") for name in manifest["files"] if name.endswith(".bin"))
    return sorted(name for name in names if name.startswith(f"{split}/"))


def token_dtype(vocab_size: int) -> str:
    """NumPy name of the smallest type for the ids 0 .. vocab_size - 1."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_file(folder / MANIFEST, strict_json(manifest, indent=1, ensure_ascii=False))


def read_manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def is_complete(folder: Path) -> bool:
    """Whether the folder was completed in this format and every file still has its size."""
    try:
        manifest = read_manifest(folder)
        return manifest["format"] == FORMAT and all(
            (folder / name).stat().st_size == file["bytes"] for name, file in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False
