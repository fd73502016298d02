"""Sharded checkpoints: each rank writes its shards in the background, and any mesh can read them.

A checkpoint is a folder with the name that a file would have: `shards/` holds every tensor in the format of
torch.distributed.checkpoint, `rest.pt` everything else. It is written under a temporary name and renamed once all ranks
are done, so it is never incomplete. Names of tensors don't depend on ranks: `model/<name>`,
`optimizer/<number>/<parameter>/<what>`, and `callback/<its key>/<what>/<parameter's name>` for what a callback stores
for parameters.
"""

import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from dsv3_lightning.common.files import BESIDE, os_error, put_in_place, reason_of, remove, sync_all
from dsv3_lightning.errors import ConfigError, RunStopped, WriteError
from dsv3_lightning.parallel.tensors import as_dtensor_like, local

SHARDS, REST = "shards", "rest.pt"


class Saver:
    """Writes checkpoints from a thread of each rank; training waits only for the copy to a host buffer."""

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo")  # separate, so the thread's collectives don't mix with training's
        self.thread = ThreadPoolExecutor(1)
        cuda = torch.cuda.is_available()
        self.stager = DefaultStager(StagingOptions(cuda, False, use_async_staging=False, use_non_blocking_copy=cuda))
        self.pending: Future[None] | None = None

    def save(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Starts to write a checkpoint, once the previous one is done. Every rank must call it."""
        self.finish()
        tensors, rest = split(checkpoint)
        beside = path.with_name(path.name + BESIDE)
        failed: list[str | None] = [begin(beside, rest) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(failed, src=0, group=self.group)
        if failed[0] is not None:
            raise could_not_write(path, 0, failed[0])
        written: Any = dcp.async_save(
            tensors, checkpoint_id=beside / SHARDS, process_group=self.group, async_stager=self.stager
        )
        self.pending = self.thread.submit(commit, written, beside, path)

    def then(self, work: Callable[[], None]) -> None:
        """Does the work on the first rank once the last checkpoint is written, in the background."""
        if dist.get_rank() == 0:
            self.pending = self.thread.submit(after, self.pending, work)

    def finish(self) -> None:
        """Waits for the last checkpoint, and raises the error of writing it, if any."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()


def after(pending: Future[None] | None, work: Callable[[], None]) -> None:
    if pending is not None:
        pending.result()
    work()


def begin(beside: Path, rest: dict[str, Any]) -> str | None:
    """Makes the folder, with everything but the tensors. Returns the reason of a failure, or None."""
    try:
        remove(beside)  # left by a run that was killed
        beside.mkdir(parents=True)
        write(rest, beside / REST)
        sync_all(beside / REST)
    except (OSError, RuntimeError) as error:
        return reason(error)
    return None


def write(content: dict[str, Any], path: Path) -> None:
    """Writes a file for torch.load. Raises OSError, or torch's error for it."""
    with open(path, "wb") as file:  # given a path, torch would hide the system's error
        torch.save(content, file)


def commit(written: Future[Any], beside: Path, path: Path) -> None:
    """Renames the folder on the first rank once all ranks have written theirs. Raises WriteError if one failed."""
    try:
        written.result()
    except CheckpointException as error:
        if dist.get_rank() == 0:
            remove(beside)
        rank, (failure, _) = min(error.failures.items(), key=lambda item: item[0])
        raise could_not_write(path, rank, reason(failure)) from error
    if dist.get_rank() == 0:
        try:
            put_in_place(beside, path)
        except OSError as error:
            raise could_not_write(path, 0, reason_of(error)) from error


def could_not_write(path: Path, rank: int, why: str) -> Exception:
    """The error to raise: that of the rank that failed, or on the others one that names it."""
    if dist.get_rank() == rank:
        return WriteError(path, why)
    return RunStopped(f"rank {dist.get_rank()} stops: rank {rank} could not write {path} ({why})")


def reason(error: BaseException) -> str:
    found = os_error(error)
    return reason_of(found) if found else " ".join(str(error).split()) or type(error).__name__


def split(checkpoint: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors that are no scalars, by name, and the rest of the checkpoint."""
    tensors = {f"model/{name}": value for name, value in checkpoint["state_dict"].items()}
    optimizers = []
    for number, state in enumerate(checkpoint["optimizer_states"]):
        named = {(index, what): v for index, values in state["state"].items() for what, v in values.items()}
        named |= {(index, "master"): master for index, master in enumerate(state.get("masters", ()))}
        tensors |= {f"optimizer/{number}/{index}/{what}": v for (index, what), v in named.items() if v.dim()}
        scalars: dict[int, dict[str, Tensor]] = {index: {} for index in state["state"]}
        for (index, what), value in named.items():
            if not value.dim():
                scalars[index][what] = value
        optimizers.append({"state": scalars, "param_groups": state["param_groups"]})
    callbacks = {}
    for owner, state in checkpoint.get("callbacks", {}).items():
        parts = {what: v for what, v in state.items() if isinstance(v, dict) and any(map(is_sharded, v.values()))}
        tensors |= {f"callback/{owner}/{what}/{name}": v for what, named in parts.items() for name, v in named.items()}
        callbacks[owner] = state | {what: {} for what in parts}
    return tensors, {**checkpoint, "state_dict": {}, "optimizer_states": optimizers, "callbacks": callbacks}


def is_sharded(value: Any) -> bool:
    return isinstance(value, DTensor)


def join(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint that `split` took apart."""
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "model":
            rest["state_dict"][name] = value
            continue
        owner, index, what = name.split("/")
        if kind == "callback":
            rest["callbacks"][owner][index][what] = value
            continue
        state = rest["optimizer_states"][int(owner)]
        if what == "master":
            state.setdefault("masters", {})[int(index)] = value
        else:
            state["state"][int(index)][what] = value
    for state in rest["optimizer_states"]:
        if "masters" in state:
            state["masters"] = [master for _, master in sorted(state["masters"].items())]
    return rest


def read_rest(path: Path) -> tuple[dict[str, Any], Metadata]:
    """Everything but the tensors, and the metadata of these. Raises ConfigError if the folder is incomplete."""
    try:
        rest = torch.load(path / REST, map_location="cpu", weights_only=True)
        metadata = read_metadata(path)
    except Exception as error:  # torch raises many types for a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{path}: not a readable checkpoint ({reason})") from error
    ends: dict[str, int] = {}  # V3 on 2,048 ranks: 5.8 million shards in 2,048 files; stat each file once
    for stored in (metadata.storage_data or {}).values():
        ends[stored.relative_path] = max(ends.get(stored.relative_path, 0), stored.offset + stored.length)
    for name, end in ends.items():
        file = path / SHARDS / name
        if not file.is_file() or file.stat().st_size < end:
            raise ConfigError(f"{path}: not a readable checkpoint ({SHARDS}/{name} is missing or cut)")
    return rest, metadata


def read_metadata(path: Path) -> Metadata:
    return dcp.FileSystemReader(path / SHARDS).read_metadata()


def read_whole(path: Path) -> dict[str, Any]:
    """The full checkpoint, as one file would hold it, on the CPU of a single process. Raises ConfigError."""
    return read_into(path, lambda key, entry: torch.empty(entry.size, dtype=entry.properties.dtype), alone=True)


def read_parts(path: Path, own: dict[str, Tensor], weights: list[list[Tensor]]) -> dict[str, Any]:
    """The checkpoint with DTensors laid out as this rank's. Every rank must call it. Raises ConfigError.

    own: the module's state dict. weights: each optimizer's parameters; empty to read only the module's state.
    """

    def target(key: str, entry: TensorStorageMetadata) -> Tensor | None:
        kind, _, name = key.partition("/")
        if kind == "optimizer" and not weights:
            return None
        if kind == "optimizer":
            number, index, _ = name.split("/")
            weight: Tensor | None = weights[int(number)][int(index)]
        else:
            weight = own.get(name if kind == "model" else f"model.{name.split('/')[-1]}")
        if weight is None:
            raise ConfigError(f"{path}: its weights are those of another model ({name})")
        if weight.shape != entry.size:
            raise ConfigError(f"{path}: {name} is {tuple(entry.size)} there, {tuple(weight.shape)} here")
        return as_dtensor_like(weight, torch.empty_like(local(weight.detach()), dtype=entry.properties.dtype))

    return read_into(path, target, alone=False)


def read_into(path: Path, target: Callable[[str, TensorStorageMetadata], Tensor | None], alone: bool) -> dict[str, Any]:
    """The checkpoint, read into the tensors that `target` returns for a name and metadata; None skips a tensor."""
    rest, metadata = read_rest(path)
    entries = metadata.state_dict_metadata
    wanted = {key: target(key, entry) for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    tensors = {key: tensor for key, tensor in wanted.items() if tensor is not None}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*load in a single process.*")  # intended with `alone`
        dcp.load(tensors, checkpoint_id=path / SHARDS, no_dist=alone)
    return join(tensors, rest)
