"""Token files: the tokenized documents on disk, memory-mapped. Imports no torch.

    SPLIT/00000.bin  the ids of all documents, each BOS ... EOS; uint16 where the tokenizer fits into it, else uint32
    SPLIT/00000.idx  where each document begins, and the end: uint64 [documents + 1]
    SPLIT/00000.src  the origin of each document, as an index into the manifest's `origins`: uint16 [documents]
    SPLIT/00000.ans  only with conversations: begin and end of each span of tokens that are trained on, alternating:
                     uint64 [2 · spans], rising
    manifest.json    width, counts, and bytes and sha256 of every file; written last

All little-endian. Document boundaries are stored, not inferred from EOS, which a document may lack or contain twice.
"""

import hashlib
import json
import os
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_lightning.common.files import FileRecord, write_file
from dsv3_lightning.common.strict_json import strict_json
from dsv3_lightning.errors import ConfigError

FORMAT = 3
MANIFEST = "manifest.json"


class TokenWriter:
    """Writes one split: `add` documents, then `close`. Raises ConfigError for an id that the tokenizer doesn't have."""

    def __init__(self, folder: Path, split: str, vocab_size: int, bos_id: int, eos_id: int) -> None:
        (folder / split).mkdir()
        self.folder, self.split, self.vocab_size = folder, split, vocab_size
        self.bos_id, self.eos_id = bos_id, eos_id
        self.dtype = token_dtype(vocab_size)
        self.offsets, self.origins, self.loss_spans = array("Q", [0]), array("H"), array("Q")
        self.sha256 = hashlib.sha256()
        self.file = open(folder / split / "00000.bin", "wb")

    def add(self, ids: np.ndarray, origin: int = 0) -> None:
        """Adds a document's ids [n], any integer type, without BOS and EOS. origin: index of its origin."""
        document = np.concatenate([[self.bos_id], np.asarray(ids, dtype=np.int64), [self.eos_id]])
        self.add_whole(document, [(0, len(document))], origin)

    def add_whole(self, document: np.ndarray, loss_spans: list[tuple[int, int]], origin: int) -> None:
        """Adds a document including BOS and EOS. loss_spans: (begin, end) of the spans that are trained on."""
        if document.min() < 0 or document.max() >= self.vocab_size:  # a cast would wrap silently
            wrong = document.max() if document.min() >= 0 else document.min()
            raise ConfigError(f"data.tokenizer: token id {wrong} is not below the vocabulary's size {self.vocab_size}")
        content = document.astype(self.dtype).tobytes()
        self.file.write(content)
        self.sha256.update(content)
        for begin, end in loss_spans:
            if self.loss_spans and self.loss_spans[-1] == self.offsets[-1] + begin:
                self.loss_spans.pop()  # continues the previous span, as texts always do
            else:
                self.loss_spans.append(self.offsets[-1] + begin)
            self.loss_spans.append(self.offsets[-1] + end)
        self.offsets.append(self.offsets[-1] + len(document))
        self.origins.append(origin)

    def close(self) -> dict[str, FileRecord]:
        """Syncs everything to disk; returns the split's files by their path below the folder."""
        self.file.flush()
        os.fsync(self.file.fileno())
        size = self.file.tell()
        self.file.close()
        index = np.frombuffer(self.offsets, dtype=np.uint64).astype("<u8").tobytes()
        origins = np.array(self.origins, dtype="<u2").tobytes()
        files: dict[str, FileRecord] = {
            f"{self.split}/00000.bin": {"bytes": size, "sha256": self.sha256.hexdigest()},
            f"{self.split}/00000.idx": write_file(self.folder / self.split / "00000.idx", index),
            f"{self.split}/00000.src": write_file(self.folder / self.split / "00000.src", origins),
        }
        if list(self.loss_spans) not in ([], [0, self.offsets[-1]]):
            loss_spans = np.frombuffer(self.loss_spans, dtype=np.uint64).astype("<u8").tobytes()
            files[f"{self.split}/00000.ans"] = write_file(self.folder / self.split / "00000.ans", loss_spans)
        return files


class TokenFile:
    """A memory-mapped split. tokens: all ids [N] uint16 or uint32. Pickled as its path."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        self.manifest = read_manifest(folder)
        self.tokens = mapped(folder / split / "00000.bin", self.manifest["dtype"])
        self._offsets = mapped(folder / split / "00000.idx", "<i8")  # of uint64 below 2^63: the same bytes

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenFile, (self.folder, self.split)

    def offsets(self) -> np.ndarray:
        """The begin of each document, and the end of the last: int64 [documents + 1]."""
        return self._offsets

    def origins(self) -> np.ndarray:
        """The origin of each document, as an index into the manifest's `origins`: uint16 [documents]."""
        return mapped(self.folder / self.split / "00000.src", "<u2")

    def loss_spans(self) -> np.ndarray | None:
        """Begin and end of each span of tokens that are trained on: int64 [2 · spans]; None if all tokens are."""
        path = self.folder / self.split / "00000.ans"
        return mapped(path, "<i8") if path.exists() else None


def mapped(path: Path, dtype: str) -> np.ndarray:
    """A memory-mapped array as a plain view, which slices several times faster than np.memmap; handles empty files."""
    return np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.empty(0, dtype)


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
