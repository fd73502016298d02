"""A folder of shards in a process alone: what is in it, and its tensors one at a time, by part or by expert."""

import copy
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.parallel.checkpoints.shards import SHARDS, join, read_rest

PREFIX = "model/"  # see `sharded`


class ShardReader:
    """Raises ConfigError, also for a folder that is not whole.

    kept: of the two stacked tensors read last (the two of a layer's experts take turns) the parts that hold the expert.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rest, self.metadata = read_rest(path)  # looks at all files
        self.kept: dict[str, dict[MetadataIndex, Tensor]] = {}

    def names(self) -> list[str]:
        return [key.removeprefix(PREFIX) for key in self.metadata.state_dict_metadata if key.startswith(PREFIX)]

    def outline(self) -> dict[str, Any]:
        """The checkpoint as one file would hold it; what is in the shards has shapes and dtypes, but no numbers."""
        entries = self.metadata.state_dict_metadata.items()
        tensors = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for key, entry in entries
            if isinstance(entry, TensorStorageMetadata)
        }
        return join(tensors, copy.deepcopy(self.rest))  # which it fills

    def parts(self) -> list[MetadataIndex]:
        """All that ranks wrote, each a tensor or a part of it, in the order of the files."""
        places = self.metadata.storage_data
        return sorted(places, key=lambda index: (places[index].relative_path, places[index].offset))

    def read(self, name: str, place: int | None = None) -> Tensor:
        """The tensor, or what stands at `place` of its first dim."""
        entry = self.metadata.state_dict_metadata.get(PREFIX + name)
        if not isinstance(entry, TensorStorageMetadata):
            raise ConfigError(f"{self.path}: holds no {name}")
        whole = torch.empty(entry.size if place is None else entry.size[1:], dtype=entry.properties.dtype)
        used: dict[MetadataIndex, Tensor] = {}
        for chunk in entry.chunks:
            offsets = chunk.offsets
            if place is not None and not offsets[0] <= place < offsets[0] + chunk.sizes[0]:
                continue
            index = MetadataIndex(PREFIX + name, offsets)
            part = self.kept.get(name, {}).get(index)
            part = self.read_part(index) if part is None else part
            if place is not None:
                used[index] = part
                part, offsets = part[place - offsets[0]], offsets[1:]
            whole[tuple(slice(at, at + size) for at, size in zip(offsets, part.shape))] = part
        if used:
            others = [(key, parts) for key, parts in self.kept.items() if key != name]
            self.kept = dict([*others[-1:], (name, used)])
        return whole

    def read_part(self, index: MetadataIndex) -> Tensor:
        """What one rank wrote of a tensor. Raises ConfigError where it is damaged."""
        place = self.metadata.storage_data[index]
        with open(self.path / SHARDS / place.relative_path, "rb") as file:
            file.seek(place.offset)
            try:
                return torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)
            except Exception as error:  # torch raises half a dozen kinds
                raise ConfigError(f"{self.path}: {index.fqn} in {SHARDS}/{place.relative_path} is damaged") from error
