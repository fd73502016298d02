"""Where each shard of a sharded checkpoint lies, as arrays.

torch.distributed.checkpoint describes each shard by Python objects of 2 KB in all (`.metadata`, a pickle). Reading
needs about 16 bytes of that, which one rank can send to all others.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.parallel.checkpoints.shards import SHARDS

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Index:
    """The shards of all tensors, sorted by tensor.

    Shard s is in file `files[file[s]]`, bytes `start[s]` to `start[s] + length[s]`, and holds the tensor from
    `offsets[s]` on, `sizes[s]` numbers along each dim; `offsets` and `sizes` are [shards, most dims of any tensor],
    padded with 0 and 1. Tensor t has the shards `first[t]` to `first[t + 1]`. Arrays are of the smallest unsigned type.
    """

    tensors: dict[str, tuple[torch.Size, torch.dtype]]
    files: list[str]
    first: np.ndarray
    file: np.ndarray
    start: np.ndarray
    length: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.file)

    def ends(self) -> dict[str, int]:
        """How long each file has to be, in bytes."""
        ends = np.zeros(len(self.files), np.int64)
        np.maximum.at(ends, self.file, self.start.astype(np.int64) + self.length)
        return dict(zip(self.files, ends.tolist()))

    def names(self, shards: np.ndarray) -> list[str]:
        """The tensor of each of these shards."""
        names = list(self.tensors)
        return [names[tensor] for tensor in np.searchsorted(self.first, shards, side="right") - 1]

    def in_order_of_files(self, shards: np.ndarray) -> np.ndarray:
        """The shards as they follow each other on the disk."""
        return shards[np.lexsort((self.start[shards], self.file[shards]))]

    def place(self, shard: int, dims: int) -> Slices:
        """The slice of each dim of the tensor that the shard is. dims: of the tensor."""
        offsets, sizes = self.offsets[shard, :dims].tolist(), self.sizes[shard, :dims].tolist()
        return tuple(slice(at, at + size) for at, size in zip(offsets, sizes))

    def overlapping(self, wanted: dict[str, Slices]) -> np.ndarray:
        """The shards that hold some of the numbers in these slices of tensors; steps are 1."""
        dims, found = self.offsets.shape[1], [np.zeros(0, np.int64)]
        for tensor, name in enumerate(self.tensors):
            if name not in wanted:
                continue
            begin, end = int(self.first[tensor]), int(self.first[tensor + 1])
            low = np.array([part.start for part in wanted[name]] + [0] * (dims - len(wanted[name])), np.int64)
            high = np.array([part.stop for part in wanted[name]] + [1] * (dims - len(wanted[name])), np.int64)
            offsets = self.offsets[begin:end].astype(np.int64)
            sizes = self.sizes[begin:end].astype(np.int64)
            common = np.minimum(offsets + sizes, high) > np.maximum(offsets, low)
            found.append(np.flatnonzero(common.all(1)) + begin)
        return np.concatenate(found)


def index_of(metadata: Metadata) -> Index:
    """Raises KeyError where a shard's place isn't stored. Shards without numbers are left out."""
    entries = {key: e for key, e in metadata.state_dict_metadata.items() if isinstance(e, TensorStorageMetadata)}
    dims = max((len(entry.size) for entry in entries.values()), default=0)
    numbers: dict[str, int] = {}  # of files
    first, places = [0], [np.zeros((0, 3), np.int64)]
    offsets, sizes = [np.zeros((0, dims), np.int64)], [np.zeros((0, dims), np.int64)]
    for name, entry in entries.items():
        chunks = [chunk for chunk in entry.chunks if 0 not in chunk.sizes]
        stored = [metadata.storage_data[MetadataIndex(name, chunk.offsets)] for chunk in chunks]
        at = [(numbers.setdefault(info.relative_path, len(numbers)), info.offset, info.length) for info in stored]
        places.append(np.array(at, np.int64).reshape(-1, 3))
        pad = ((0, 0), (0, dims - len(entry.size)))
        for arrays, rows, padding in (
            (offsets, [chunk.offsets for chunk in chunks], 0),
            (sizes, [chunk.sizes for chunk in chunks], 1),
        ):
            array = np.array(rows, np.int64).reshape(len(chunks), len(entry.size))
            arrays.append(np.pad(array, pad, constant_values=padding))
        first.append(first[-1] + len(chunks))
    file, start, length = np.concatenate(places).T
    return Index(
        {name: (entry.size, entry.properties.dtype) for name, entry in entries.items()}, list(numbers),
        narrow(np.array(first)), narrow(file), narrow(start), narrow(length),
        narrow(np.concatenate(offsets)), narrow(np.concatenate(sizes)),
    )  # fmt: skip


def narrow(array: np.ndarray) -> np.ndarray:
    """The same numbers, none of them negative, in the smallest unsigned type."""
    return np.ascontiguousarray(array, np.min_scalar_type(array.max(initial=0)))


def read_index(path: Path) -> Index:
    """The index of a folder, all of whose files are there, in full length. Raises ConfigError."""
    try:
        found = (path / SHARDS / ".metadata").stat()
        index = unpickled(path, found.st_mtime_ns, found.st_size)
    except Exception as error:  # unpickling raises many types
        raise not_readable(path, error) from error
    for name, end in index.ends().items():
        file = path / SHARDS / name
        if not file.is_file() or file.stat().st_size < end:
            raise ConfigError(f"{path}: not a readable checkpoint ({SHARDS}/{name} is missing or cut)")
    return index


@lru_cache(maxsize=1)  # a start judges a checkpoint and then loads it; V3 on 2,048 ranks has 5.7 million shards
def unpickled(path: Path, changed: int, size: int) -> Index:
    """changed, size: of the file, so that another one of the same name is read."""
    with without_collection():
        return index_of(dcp.FileSystemReader(path / SHARDS).read_metadata())


@contextmanager
def without_collection() -> Iterator[None]:
    """Garbage isn't looked for, which would go through millions of objects that are all in use, again and again."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def not_readable(path: Path, error: Exception) -> ConfigError:
    """What to raise for any error of reading a checkpoint: its first line, or its type."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ConfigError(f"{path}: not a readable checkpoint ({reason})")
