"""Loading a sharded checkpoint: the first rank finds where everything lies, and each rank reads what it needs."""

import io
from collections.abc import Callable, Collection
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_lightning.common.files import reason_of
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.parallel.checkpoints.index import Index, Slices
from dsv3_lightning.parallel.checkpoints.metadata import not_readable, read_index, unpickled
from dsv3_lightning.parallel.checkpoints.names import REST, SHARDS
from dsv3_lightning.parallel.checkpoints.shards import join
from dsv3_lightning.parallel.tensors import as_dtensor_like, local, slices_of

T = TypeVar("T")


def read_rest(path: Path) -> dict[str, Any]:
    """Everything but the tensors. Raises ConfigError."""
    try:
        rest: dict[str, Any] = torch.load(path / REST, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file
        raise not_readable(path, error) from error
    return rest


def read_whole(path: Path) -> dict[str, Any]:
    """The full checkpoint, as one file would hold it, on the CPU of a single process. Raises ConfigError."""
    rest, index = read_rest(path), read_index(path)
    tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in index.tensors.items()}
    fill(path, index, tensors)
    return join(tensors, rest)


def read_parts(
    path: Path, own: dict[str, Tensor], weights: list[dict[int, Tensor]], elsewhere: Collection[str] = ()
) -> dict[str, Any]:
    """The checkpoint with DTensors laid out as this rank's. Every rank must call it. Raises ConfigError, on all ranks.

    own: the module's state dict. weights: each optimizer's parameters by their numbers; empty to read only the module's
    state. elsewhere: names that other ranks of a pipeline have, whose optimizer's numbers this one lacks, too.
    """
    rest, index = on_first_rank(lambda: (read_rest(path), read_index(path)))
    unpickled.cache_clear()
    tensors = {}
    for key, (size, dtype) in index.tensors.items():
        weight = weight_of(key, own, weights)
        if weight is None and key.startswith("optimizer/") and not weights:
            continue
        name = key.removeprefix("model/")
        if weight is None and elsewhere and (name == key or name in elsewhere):
            continue
        if weight is None:
            raise ConfigError(f"{path}: its weights are those of another model ({name})")
        if weight.shape != size:
            raise ConfigError(f"{path}: {name} is {tuple(size)} there, {tuple(weight.shape)} here")
        tensors[key] = as_dtensor_like(weight, torch.empty_like(local(weight.detach()), dtype=dtype))
    together(lambda: fill(path, index, tensors))
    return join(tensors, rest)


def weight_of(key: str, own: dict[str, Tensor], weights: list[dict[int, Tensor]]) -> Tensor | None:
    """The tensor of this rank that has the layout of the checkpoint's tensor, if there is one."""
    kind, _, name = key.partition("/")
    if kind != "optimizer":
        return own.get(name if kind == "model" else f"model.{name.split('/')[-1]}")
    number, index, _ = name.split("/")
    return weights[int(number)].get(int(index)) if int(number) < len(weights) else None


def on_first_rank(read: Callable[[], T]) -> T:
    """What `read` returns on the first rank, on every rank; all must call it. Its ConfigError is raised on all."""
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = read()
        except ConfigError as error:
            told[1] = str(error)
    dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise ConfigError(told[1])
    read_there: T = told[0]
    return read_there


def together(work: Callable[[], None]) -> None:
    """Does the work on every rank. Raises the ConfigError of the first rank that has one, on all of them."""
    failure = None
    try:
        work()
    except ConfigError as error:
        failure = str(error)
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    for found in filter(None, failures):
        raise ConfigError(found)


def fill(path: Path, index: Index, tensors: dict[str, Tensor]) -> None:
    """Reads this rank's shards of tensors, from as many files as hold some of them. Raises ConfigError."""
    wanted = {name: slices_of(tensor) for name, tensor in tensors.items()}
    shards = index.in_order_of_files(index.overlapping(wanted))
    numbered = zip(shards.tolist(), index.names(shards), strict=True)
    for number, of_file in groupby(numbered, key=lambda shard: index.file[shard[0]]):
        relative = index.files[number]
        try:
            with open(path / SHARDS / relative, "rb") as file:
                for shard, name in of_file:
                    place = index.place(shard, len(wanted[name]))
                    copy_common(read_shard(path, index, shard, name, file), place, local(tensors[name]), wanted[name])
        except OSError as error:
            raise ConfigError(f"{path}: {SHARDS}/{relative} can't be read ({reason_of(error)})") from error


def read_shard(path: Path, index: Index, shard: int, name: str, file: BinaryIO) -> Tensor:
    """A shard of the named tensor. file: opened, the one that holds it. Raises ConfigError if it is damaged."""
    file.seek(int(index.start[shard]))
    content = io.BytesIO(file.read(int(index.length[shard])))
    try:
        part: Tensor = torch.load(content, map_location="cpu", weights_only=True)
        if list(part.shape) != index.sizes[shard, : part.dim()].tolist():
            raise ValueError("another shape")
    except Exception as error:  # torch raises many types
        raise ConfigError(f"{path}: {name} in {SHARDS}/{index.files[index.file[shard]]} is damaged") from error
    return part


@torch.no_grad()
def copy_common(part: Tensor, place: Slices, own: Tensor, wanted: Slices) -> None:
    """Copies what a shard of a tensor, at `place`, and this rank's, which is `wanted` of it, have in common."""
    common = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(place, wanted, strict=True)]
    there = tuple(slice(c.start - a.start, c.stop - a.start) for c, a in zip(common, place))
    here = tuple(slice(c.start - b.start, c.stop - b.start) for c, b in zip(common, wanted))
    own[here].copy_(part[there])
