"""The `.metadata` of torch.distributed.checkpoint, read into an index and written from one.

It describes each shard by Python objects of 2 KB in all, of which an index has some 20 bytes.
"""

import gc
import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.parallel.checkpoints.index import Index, narrow
from dsv3_lightning.parallel.checkpoints.names import SHARDS

FORGET_AFTER = 1000  # entries, whose parts the pickle refers to in place of repeating them


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


class Streamed:
    """A dict that is pickled entry by entry, so that its millions of entries are never in memory together."""

    def __init__(self, entries: Iterator[tuple[Any, Any]]) -> None:
        self.entries = entries

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (), None, None, self.entries


def metadata_of(index: Index) -> bytes:
    """The content of the `.metadata` file, from which `index_of` makes the same index."""
    content = io.BytesIO()
    pickler = pickle.Pickler(content, protocol=3)  # in later ones references count from the file's start

    def described() -> Iterator[tuple[str, TensorStorageMetadata]]:
        for number, (name, (size, dtype)) in enumerate(index.tensors.items()):
            shards = range(int(index.first[number]), int(index.first[number + 1]))
            chunks = [ChunkStorageMetadata(*place_of(index, shard, len(size))) for shard in shards]
            yield name, TensorStorageMetadata(TensorProperties(dtype), size, chunks)
            pickler.clear_memo()

    def stored() -> Iterator[tuple[MetadataIndex, _StorageInfo]]:
        for number, (name, (size, _)) in enumerate(index.tensors.items()):
            first, end = int(index.first[number]), int(index.first[number + 1])
            for shard in range(first, end):
                offsets, _ = place_of(index, shard, len(size))
                file, start, length = index.files[index.file[shard]], int(index.start[shard]), int(index.length[shard])
                yield MetadataIndex(name, offsets, shard - first), _StorageInfo(file, start, length)
                if shard % FORGET_AFTER == 0:
                    pickler.clear_memo()

    names: Any = {name: (name,) for name in index.tensors}
    entries: Any = Streamed(described())
    with without_collection():
        pickler.dump(Metadata(entries, names, Streamed(stored()), version=CURRENT_DCP_VERSION))
    return content.getvalue()


def place_of(index: Index, shard: int, dims: int) -> tuple[torch.Size, torch.Size]:
    """The shard's offsets and sizes."""
    return torch.Size(index.offsets[shard, :dims].tolist()), torch.Size(index.sizes[shard, :dims].tolist())


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
