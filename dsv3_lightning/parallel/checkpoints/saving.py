"""Saving sharded checkpoints from a training process, which goes on once its shards are copied in memory."""

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_lightning.errors import RunStopped, WriteError
from dsv3_lightning.parallel.checkpoints import writer
from dsv3_lightning.parallel.checkpoints.agreement import Agreement
from dsv3_lightning.parallel.checkpoints.buffer import Buffer, memory_file
from dsv3_lightning.parallel.checkpoints.jobs import NO_STORE, Failure, NameAgain, Plan, Save, WriterGroup
from dsv3_lightning.parallel.checkpoints.plan import layout_of, plan_of
from dsv3_lightning.parallel.checkpoints.shards import split
from dsv3_lightning.parallel.tensors import local

# Ctrl-C and a scheduler's notice reach the whole process group; the training process decides what to do.
NOT_FOR_WRITERS = [getattr(signal, f"SIG{name}") for name in ("INT", "TERM", "HUP", "USR1", "USR2")]


class Saver:
    """Gives checkpoints to a process of each rank that writes them. Every rank must make one.

    holders: the ranks that have the same plain tensors as this one; all by default.
    """

    def __init__(self, holders: list[int] | None = None) -> None:
        self.rank, ranks = dist.get_rank(), dist.get_world_size()
        self.holders = list(range(ranks)) if holders is None else holders
        names = [uuid.uuid4().hex]
        dist.broadcast_object_list(names, src=0)
        store = store_of_group()
        self.group = WriterGroup(self.rank, ranks, store.host, store.port, names[0])
        self.cuda = torch.cuda.is_available()
        self.buffer = Buffer(memory_file(), pin=self.cuda)
        self.connection, self.process = start_writer(self.buffer.file)
        self.connection.send(self.group)
        self.plan, self.layout = Plan([], 0), [("none yet",)]
        self.saves = 0
        self.pending: list[Path] = []  # what the writer has not answered for yet

    def save(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Starts to write a checkpoint, once the previous one is done. Every rank must call it."""
        self.finish()
        tensors, rest = split(checkpoint)
        layout, plan = layout_of(tensors), None
        if layout != self.layout:
            self.plan = plan = plan_of(tensors, self.rank, self.holders)
            self.layout = layout
            self.buffer.map(plan.length)
        self.copy(tensors)
        content = io.BytesIO()
        if self.rank == 0:
            torch.save(rest, content)
        self.saves += 1
        self.send(Save(self.saves, path, plan, content.getvalue()), path)

    @torch.no_grad()
    def copy(self, tensors: dict[str, Tensor]) -> None:
        """Copies this rank's pieces to the buffer."""
        for piece in self.plan.with_numbers():
            piece.within(self.buffer.memory).copy_(local(tensors[piece.name]), non_blocking=True)
        if self.cuda:
            torch.cuda.current_stream().synchronize()

    def name_again(self, path: Path, name: Path) -> None:
        """Gives the last checkpoint a second name once it is written; the first rank does it for all."""
        if self.rank == 0:
            self.send(NameAgain(path, name), name)

    def send(self, job: Save | NameAgain, path: Path) -> None:
        self.pending.append(path)
        with suppress(OSError):  # the writer is gone, which `finish` says
            self.connection.send(job)

    def finish(self) -> None:
        """Waits for what is being written, and raises the error of writing it, if any."""
        while self.pending:
            path = self.pending.pop(0)
            try:
                failure = self.connection.recv()
            except (EOFError, OSError):
                failure = self.writer_is_gone()
            if failure is not None:
                self.pending.clear()
                raise self.could_not_write(path, failure)

    def writer_is_gone(self) -> Failure:
        """Tells all ranks that this one's shards will not be written."""
        code = self.process.wait()
        if code == NO_STORE:
            return Failure(0, None)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        failure = Failure(self.rank, f"the process that writes it {how}")
        with suppress(dist.DistError):  # the store is gone with the first rank
            Agreement(self.group, connected=store_of_group()).fail(failure.reason)
        return failure

    def could_not_write(self, path: Path, failure: Failure) -> Exception:
        """The error to raise: that of the rank that failed, or on the others one that names it."""
        rank, reason = failure
        if reason is None:
            return dist.DistNetworkError(f"rank {rank} is gone")
        if rank == self.rank:
            return WriteError(path, reason)
        return RunStopped(f"rank {self.rank} stops: rank {rank} could not write {path} ({reason})")

    def close(self) -> None:
        """Ends the writer, after what is being written."""
        with suppress(OSError):
            self.connection.send(None)
        self.process.wait()
        self.connection.close()
        self.buffer.close()


def store_of_group() -> dist.TCPStore:
    """The store by which the ranks have met."""
    store: Any = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    assert isinstance(store, dist.TCPStore), "writers can't reach the store of this process group"
    return store


def start_writer(buffer_file: int) -> tuple[Any, subprocess.Popen]:
    """Starts the process that writes, and returns the connection to it. It doesn't hear what ends this process.

    Signals that are blocked when a process is started stay blocked in it.
    """
    here, there = multiprocessing.Pipe()
    command = [sys.executable, "-m", writer.__name__, str(there.fileno()), str(buffer_file), str(os.getpid())]
    paths = os.pathsep.join(path for path in sys.path if path)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_WRITERS)
    try:
        process = subprocess.Popen(
            command, pass_fds=(there.fileno(), buffer_file), stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    there.close()
    return here, process
