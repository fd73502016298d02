"""Where each shard of a sharded checkpoint lies: arrays of 20 bytes per shard, which ranks can send each other."""

from dataclasses import dataclass

import numpy as np
import torch

from dsv3_lightning.errors import ConfigError

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


def narrow(array: np.ndarray) -> np.ndarray:
    """The same numbers, none of them negative, in the smallest unsigned type."""
    return np.ascontiguousarray(array, np.min_scalar_type(array.max(initial=0)))


def joined(indices: list[Index]) -> Index:
    """One index of the files of several; of shards at the same place of a tensor the first one counts.

    Raises ConfigError where two have a tensor of the same name that isn't the same.
    """
    tensors: dict[str, tuple[torch.Size, torch.dtype]] = {}
    for index in indices:
        for name, found in index.tensors.items():
            if tensors.setdefault(name, found) != found:
                raise ConfigError(f"ranks have different tensors named {name}: {tensors[name]} and {found}")
    numbers = {name: number for number, name in enumerate(tensors)}
    dims = max((index.offsets.shape[1] for index in indices), default=0)
    files: list[str] = []
    columns: list[list[np.ndarray]] = [[], [], [], [], [], []]
    for index in indices:
        of_tensors = np.array([numbers[name] for name in index.tensors], np.int64)
        pad = ((0, 0), (0, dims - index.offsets.shape[1]))
        found_here = (
            np.repeat(of_tensors, index.first[1:] - index.first[:-1]), index.file.astype(np.int64) + len(files),
            index.start, index.length, np.pad(index.offsets, pad), np.pad(index.sizes, pad, constant_values=1),
        )  # fmt: skip
        for column, array in zip(columns, found_here, strict=True):
            column.append(array.astype(np.int64))
        files += index.files
    tensor, file, start, length, offsets, sizes = map(np.concatenate, columns)
    order = np.lexsort((*offsets.T[::-1], tensor))
    keys = np.column_stack((tensor, offsets))[order]
    order = order[np.concatenate(([True], (keys[1:] != keys[:-1]).any(1)))] if len(order) else order
    first = np.searchsorted(tensor[order], np.arange(len(tensors) + 1))
    return Index(
        tensors, files, narrow(first), narrow(file[order]), narrow(start[order]), narrow(length[order]),
        narrow(offsets[order]), narrow(sizes[order]),
    )  # fmt: skip
