"""Reading a sharded checkpoint in a single process: its contents, and its tensors one by one, by shard or by expert."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.parallel.checkpoints.loading import copy_common, read_rest, read_shard
from dsv3_lightning.parallel.checkpoints.metadata import read_index
from dsv3_lightning.parallel.checkpoints.names import SHARDS
from dsv3_lightning.parallel.checkpoints.shards import join

PREFIX = "model/"  # see shards.py


class ShardReader:
    """Reads tensors of a sharded checkpoint. Raises ConfigError, also for an incomplete folder.

    kept: a cache of the shards that hold the expert, for the two stacked tensors read last: those of a layer's experts
    alternate.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rest, self.index = read_rest(path), read_index(path)
        self.kept: dict[str, dict[int, Tensor]] = {}

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.rest["settings"])

    def names(self) -> list[str]:
        return [key.removeprefix(PREFIX) for key in self.index.tensors if key.startswith(PREFIX)]

    def outline(self) -> dict[str, Any]:
        """The checkpoint as one file would hold it, with meta tensors for those in the shards."""
        tensors = {
            key: torch.empty(size, dtype=dtype, device="meta") for key, (size, dtype) in self.index.tensors.items()
        }
        return join(tensors, copy.deepcopy(self.rest))  # `join` changes it

    def parts(self) -> list[tuple[int, str]]:
        """Every shard's number and the key of its tensor, in the order of the files."""
        shards = self.index.in_order_of_files(np.arange(len(self.index)))
        return list(zip(shards.tolist(), self.index.names(shards), strict=True))

    def read(self, name: str, expert: int | None = None) -> Tensor:
        """The full tensor, or its slice at index `expert` of the first dim."""
        key = PREFIX + name
        if key not in self.index.tensors:
            raise ConfigError(f"{self.path}: holds no {name}")
        size, dtype = self.index.tensors[key]
        wanted = tuple(slice(0, length) for length in size)
        if expert is not None:
            wanted = (slice(expert, expert + 1), *wanted[1:])
        whole = torch.empty([part.stop - part.start for part in wanted], dtype=dtype)
        used: dict[int, Tensor] = {}
        for shard in self.index.overlapping({key: wanted}).tolist():
            part = self.kept.get(name, {}).get(shard)
            part = self.read_part(shard, key) if part is None else part
            copy_common(part, self.index.place(shard, part.dim()), whole, wanted)
            if expert is not None:
                used[shard] = part
        if used:
            others = [(other, parts) for other, parts in self.kept.items() if other != name]
            self.kept = dict([*others[-1:], (name, used)])
        return whole if expert is None else whole[0]

    def read_part(self, shard: int, key: str) -> Tensor:
        """Raises ConfigError if the shard is damaged."""
        with open(self.path / SHARDS / self.index.files[self.index.file[shard]], "rb") as file:
            return read_shard(self.path, self.index, shard, key, file)
