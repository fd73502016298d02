"""The packed index in memory-mapped files next to the tokens, shared by all ranks and loader processes of a node.

    SPLIT/index-FORMAT-T-DEPTH[-masked]/NAME.npy    one array of `PackedIndex` each
    SPLIT/index-FORMAT-T-DEPTH[-masked]/digest      its hash, so that no start reads the index whole

The folder is built under another name and renamed when everything is on disk. Imports no torch.
"""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from dsv3_lightning.common.files import reason_of, remove_leftovers, utf8_path, whole
from dsv3_lightning.data.batches.packing import PackedIndex, pack
from dsv3_lightning.data.text.build import SPLITS
from dsv3_lightning.data.text.prepare import locked
from dsv3_lightning.data.text.progress import say
from dsv3_lightning.data.text.store import TokenFile
from dsv3_lightning.errors import WriteError

FORMAT, DIGEST = 2, "digest"
MILLION = 10**6
SECONDS = 0.5  # for a million documents
ARRAYS = [field.name for field in fields(PackedIndex)]


@dataclass(frozen=True)
class MappedIndex(PackedIndex):
    """A memory-mapped index with the hash from when it was built, pickled as its path."""

    folder: Path
    built_as: str

    @classmethod
    def open(cls, folder: Path) -> "MappedIndex":
        """Opens the index. Raises OSError, ValueError or IndexError if it is missing or damaged."""
        arrays = {name: np.asarray(open_memmap(folder / f"{name}.npy", "r")) for name in ARRAYS}
        built_as = (folder / DIGEST).read_text(encoding="utf-8")
        index = cls(**arrays, folder=folder, built_as=built_as)
        pieces = {len(arrays[name]) for name in ("starts", "lengths", "positions", "continues")}
        if pieces != {int(index.samples[-1])} or len(index.target_counts) != len(index) or len(built_as) != 16:
            raise ValueError(f"{folder}: its arrays don't belong together")
        return index

    def digest(self) -> str:
        return self.built_as

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedIndex.open, (self.folder,)


def open_index(folder: Path, split: str, sequence_length: int, mtp_depth: int, masked: bool) -> MappedIndex | None:
    """The index of a split; None if it is missing or damaged."""
    try:
        return MappedIndex.open(index_folder(folder, split, sequence_length, mtp_depth, masked))
    except (OSError, ValueError, IndexError):
        return None


def prepare_index(folder: Path, sequence_length: int, mtp_depth: int, masked: bool) -> None:
    """Builds the index of both splits if needed; several processes may call it at the same time.

    If the folder can't be written, for example because another user owns it, only prints a note.
    """
    shape = (sequence_length, mtp_depth, masked)
    try:
        for split in SPLITS:
            if open_index(folder, split, *shape) is None:
                with locked(index_folder(folder, split, *shape)):
                    if open_index(folder, split, *shape) is None:  # another process may have finished it meanwhile
                        build_index(folder, split, *shape)
    except (OSError, WriteError) as error:
        reason = error.reason if isinstance(error, WriteError) else reason_of(error)
        say(f"{utf8_path(folder)}: {reason}; every process packs the documents, and holds the index in its memory")


def build_index(folder: Path, split: str, sequence_length: int, mtp_depth: int, masked: bool) -> None:
    """Builds the index of a split. Only one process at a time may call this. Raises WriteError."""
    final = index_folder(folder, split, sequence_length, mtp_depth, masked)
    remove_leftovers(final.parent, final.name)
    file = TokenFile(folder, split)
    if (documents := file.documents) >= 10 * MILLION:
        say(f"packing {documents / MILLION:,.0f} million documents: about {SECONDS * documents / MILLION:.0f} s")
    with whole(final) as beside:
        beside.mkdir()

        def make(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
            return new_file(beside / f"{name}.npy", shape, dtype)

        index = pack(file.offsets(make), sequence_length, mtp_depth, masked, file.loss_spans(), make)
        for path in beside.iterdir():
            if path.stem not in ARRAYS:  # needed only for packing
                path.unlink()
        (beside / DIGEST).write_text(index.digest(), encoding="utf-8")


def new_file(path: Path, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array in a file. Raises OSError if the disk is too full, since writing to it would kill the process."""
    array = open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return np.asarray(array)


def index_folder(folder: Path, split: str, sequence_length: int, mtp_depth: int, masked: bool) -> Path:
    """The index's folder, named by everything that determines the index except the tokens."""
    return folder / split / f"index-{FORMAT}-{sequence_length}-{mtp_depth}{'-masked' * masked}"
