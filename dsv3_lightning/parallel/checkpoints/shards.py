"""Sharded checkpoints: each rank writes its shards in the background, and any mesh can read them.

A checkpoint is a folder with the name that a file would have: `shards/` holds every tensor in the format of
torch.distributed.checkpoint, `rest.pt` everything else. It is written under a temporary name and renamed once all ranks
are done, so it is never incomplete. Names of tensors don't depend on ranks: `model/<name>`,
`optimizer/<number>/<parameter>/<what>`, and `callback/<its key>/<what>/<parameter's name>` for what a callback stores
for parameters.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from dsv3_lightning.common.files import BESIDE, os_error, put_in_place, reason_of, remove, sync_all
from dsv3_lightning.errors import RunStopped, WriteError

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
