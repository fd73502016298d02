"""The packed index in memory-mapped files next to the tokens, shared by all ranks and loader processes of a node.

    SPLIT/NAME/ARRAY.npy    one array of `PackedIndex` each
    SPLIT/NAME/digest       its hash, so that no start reads the index whole
    SPLIT/NAME/origins.json with by_origin: each origin, its first sample and how many it has

NAME is index-FORMAT-T-DEPTH with a word for each of a `Cut`'s other settings, such as -masked.

The folder is built under another name and renamed when everything is on disk. Imports no torch.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.format import open_memmap

from dsv3_lightning.common.files import reason_of, remove_leftovers, utf8_path, whole
from dsv3_lightning.data.batches.concatenation import concatenate
from dsv3_lightning.data.batches.packing import CHUNK, Make, PackedIndex, first_sample, in_memory, pack
from dsv3_lightning.data.config import DataConfig
from dsv3_lightning.data.text.encoding import SPLITS
from dsv3_lightning.data.text.prepare import locked
from dsv3_lightning.data.text.progress import say
from dsv3_lightning.data.text.store import TokenFile
from dsv3_lightning.errors import ConfigError, WriteError

FORMAT, DIGEST, ORIGINS = 2, "digest", "origins.json"
MILLION = 10**6
SECONDS = 0.5  # for a million documents
ARRAYS = [field.name for field in fields(PackedIndex)]


class Cut(NamedTuple):
    """What determines a packed index for given tokens.

    masked: no document predicts another one. concatenated: documents are concatenated and cut, not packed best-fit.
    by_origin: no sample has documents of two origins.
    """

    sequence_length: int
    mtp_depth: int
    masked: bool
    concatenated: bool = False
    by_origin: bool = False

    def folder(self, tokens: Path, split: str) -> Path:
        """The folder of a split's index, below that of the tokens."""
        words = {"masked": self.masked, "concatenated": self.concatenated, "by-origin": self.by_origin}
        name = "-".join([*map(str, ("index", FORMAT, *self[:2])), *(word for word, is_set in words.items() if is_set)])
        return tokens / split / name


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


def open_index(folder: Path, split: str, cut: Cut) -> MappedIndex | None:
    """The index of a split; None if it is missing or damaged."""
    try:
        return MappedIndex.open(cut.folder(folder, split))
    except (OSError, ValueError, IndexError):
        return None


def cuts_of(config: DataConfig, mtp_depth: int) -> dict[str, Cut]:
    """The cut of each split. Sources with weights are packed apart, and those of the validation split always."""
    cut = Cut(config.sequence_length, mtp_depth, config.mask_document_ends, config.packing == "concatenate")
    by_origin = {"train": config.is_mixed, "validation": config.sources is not None}
    return {split: cut._replace(by_origin=by_origin[split]) for split in SPLITS}


def prepare_index(folder: Path, cuts: Mapping[str, Cut]) -> None:
    """Builds the index of each split if needed; several processes may call it at the same time.

    If the folder can't be written, for example because another user owns it, only prints a note.
    """
    try:
        for split, cut in cuts.items():
            if open_index(folder, split, cut) is None:
                with locked(cut.folder(folder, split)):
                    if open_index(folder, split, cut) is None:  # another process may have finished it meanwhile
                        build_index(folder, split, cut)
    except (OSError, WriteError) as error:
        reason = error.reason if isinstance(error, WriteError) else reason_of(error)
        say(f"{utf8_path(folder)}: {reason}; every process packs the documents, and holds the index in its memory")


def build_index(folder: Path, split: str, cut: Cut) -> None:
    """Builds the index of a split. Only one process at a time may call this. Raises WriteError."""
    final = cut.folder(folder, split)
    remove_leftovers(final.parent, final.name)
    file = TokenFile(folder, split)
    if (documents := file.documents) >= 10 * MILLION:
        say(f"packing {documents / MILLION:,.0f} million documents: about {SECONDS * documents / MILLION:.0f} s")
    with whole(final) as beside:
        beside.mkdir()

        def make(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
            return new_file(beside / f"{name}.npy", shape, dtype)

        index = make_index(file, cut, make)
        for path in beside.iterdir():
            if path.stem not in ARRAYS:  # needed only for packing
                path.unlink()
        if cut.by_origin:
            (beside / ORIGINS).write_text(json.dumps(find_origins(file, index)), encoding="utf-8")
        (beside / DIGEST).write_text(index.digest(), encoding="utf-8")


def make_index(file: TokenFile, cut: Cut, make: Make = in_memory) -> PackedIndex:
    """The index of a split's documents. make: as `pack` takes it."""
    groups = [begin for _, begin, _ in origin_runs(file.origins())[1:]] if cut.by_origin else []
    cut_up = concatenate if cut.concatenated else pack
    return cut_up(file.offsets(make), *cut[:3], file.loss_spans(), make, groups)


def origin_runs(origins: np.ndarray) -> list[tuple[int, int, int]]:
    """(origin, first document, end) of each origin, in the order of the documents. Raises ConfigError.

    origins: of each document [documents].
    """
    bounds = [0] if len(origins) else []
    for begin in range(1, len(origins), CHUNK):
        part = origins[begin - 1 : begin + CHUNK]
        bounds += (begin + np.flatnonzero(part[1:] != part[:-1])).tolist()
    runs = [(int(origins[begin]), begin, end) for begin, end in pairwise([*bounds, len(origins)])]
    if len({origin for origin, *_ in runs}) < len(runs):
        raise ConfigError("data: the prepared documents of one source don't follow each other; prepare them again")
    return runs


def samples_by_origin(file: TokenFile, index: PackedIndex) -> dict[int, tuple[int, int]]:
    """The first sample of each origin with documents, and how many it has, of an index `by_origin`."""
    if isinstance(index, MappedIndex):
        found = json.loads((index.folder / ORIGINS).read_text(encoding="utf-8"))
    else:
        found = find_origins(file, index)
    return {origin: (first, count) for origin, first, count in found}


def find_origins(file: TokenFile, index: PackedIndex) -> list[tuple[int, int, int]]:
    """Origin, first sample and number of samples, from all documents."""
    runs, offsets = origin_runs(file.origins()), file.offsets()
    firsts = [*(first_sample(index, int(offsets[begin])) for _, begin, _ in runs), len(index)]
    return [(origin, first, end - first) for (origin, *_), (first, end) in zip(runs, pairwise(firsts), strict=True)]


def new_file(path: Path, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array in a file. Raises OSError if the disk is too full, since writing to it would kill the process."""
    array = open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return np.asarray(array)
