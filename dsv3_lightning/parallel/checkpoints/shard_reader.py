"""Reading a sharded checkpoint in a single process: its contents, and its tensors one by one, by shard or by expert."""

import copy
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.parallel.checkpoints.shards import SHARDS, join, read_rest

PREFIX = "model/"  # see shards.py


class ShardReader:
    """Reads tensors of a sharded checkpoint. Raises ConfigError, also for an incomplete folder.

    kept: a cache of the shards that hold the expert, for the two stacked tensors read last: those of a layer's experts
    alternate.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rest, self.metadata = read_rest(path)  # checks all files
        self.kept: dict[str, dict[MetadataIndex, Tensor]] = {}

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.rest["settings"])

    def names(self) -> list[str]:
        return [key.removeprefix(PREFIX) for key in self.metadata.state_dict_metadata if key.startswith(PREFIX)]

    def outline(self) -> dict[str, Any]:
        """The checkpoint as one file would hold it, with meta tensors for those in the shards."""
        entries = self.metadata.state_dict_metadata.items()
        tensors = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for key, entry in entries
            if isinstance(entry, TensorStorageMetadata)
        }
        return join(tensors, copy.deepcopy(self.rest))  # `join` changes it

    def parts(self) -> list[MetadataIndex]:
        """Everything that the ranks wrote, tensors or shards of them, in the order of the files."""
        storage = self.metadata.storage_data
        return sorted(storage, key=lambda index: (storage[index].relative_path, storage[index].offset))

    def read(self, name: str, expert: int | None = None) -> Tensor:
        """The full tensor, or its slice at index `expert` of the first dim."""
        entry = self.metadata.state_dict_metadata.get(PREFIX + name)
        if not isinstance(entry, TensorStorageMetadata):
            raise ConfigError(f"{self.path}: holds no {name}")
        whole = torch.empty(entry.size if expert is None else entry.size[1:], dtype=entry.properties.dtype)
        used: dict[MetadataIndex, Tensor] = {}
        for chunk in entry.chunks:
            offsets = chunk.offsets
            if expert is not None and not offsets[0] <= expert < offsets[0] + chunk.sizes[0]:
                continue
            index = MetadataIndex(PREFIX + name, offsets)
            part = self.kept.get(name, {}).get(index)
            part = self.read_part(index) if part is None else part
            if expert is not None:
                used[index] = part
                part, offsets = part[expert - offsets[0]], offsets[1:]
            whole[tuple(slice(at, at + size) for at, size in zip(offsets, part.shape))] = part
        if used:
            others = [(key, parts) for key, parts in self.kept.items() if key != name]
            self.kept = dict([*others[-1:], (name, used)])
        return whole

    def read_part(self, index: MetadataIndex) -> Tensor:
        """The shard of a tensor that one rank wrote. Raises ConfigError if it is damaged."""
        stored = self.metadata.storage_data[index]
        with open(self.path / SHARDS / stored.relative_path, "rb") as file:
            file.seek(stored.offset)
            try:
                return torch.load(io.BytesIO(file.read(stored.length)), map_location="cpu", weights_only=True)
            except Exception as error:  # torch raises many types
                raise ConfigError(f"{self.path}: {index.fqn} in {SHARDS}/{stored.relative_path} is damaged") from error
