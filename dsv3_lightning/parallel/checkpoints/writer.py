"""The process that writes a rank's shards while the rank goes on training; `saving.Saver` starts it.

It reads the shards from memory that both share. It ends when the training process does, even in the middle of a
checkpoint: one that has no final name yet is removed by the next start.
"""

import json
import os
import pickle
import queue
import sys
import threading
import zlib
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from dsv3_lightning.common.files import (
    BESIDE,
    give_name,
    os_error,
    put_in_place,
    reason_of,
    remove,
    sync_all,
    sync_folder,
)
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.parallel.checkpoints.agreement import Agreement, Late, RankFailed
from dsv3_lightning.parallel.checkpoints.buffer import Buffer
from dsv3_lightning.parallel.checkpoints.index import Index, joined, narrow
from dsv3_lightning.parallel.checkpoints.jobs import NO_STORE, Failure, NameAgain, Plan, Save, WriterGroup
from dsv3_lightning.parallel.checkpoints.names import REST, SHARDS

SLOWEST = timedelta(minutes=30)  # from the first rank's last byte to the slowest rank's
DONE, SAME, NOT_DONE = b"+", b"=", b"-"  # begin a rank's word: its index; the same as in the last checkpoint; a reason
LOOK_EVERY = 1.0  # seconds, for the end of the training process


class Writer:
    """Writes this rank's shards, and on the first rank everything else of a checkpoint. buffer_file: see buffer.py."""

    def __init__(self, group: WriterGroup, buffer_file: int) -> None:
        self.rank, self.ranks = group.rank, group.ranks
        self.agreement = Agreement(group)
        self.plan, self.buffer = Plan([], 0), Buffer(buffer_file)
        self.told = b""  # the last index that the first rank was told
        self.indices: list[bytes] = [b""] * group.ranks
        self.metadata = b""  # of these indices
        self.failed = False

    def work(self, job: Save | NameAgain) -> Failure | None:
        if isinstance(job, Save):
            failure = self.save(job)
            self.failed = failure is not None
            if self.failed:
                self.told = b""  # the first rank may not have heard it
            return failure
        return None if self.failed else self.attempt(lambda: give_name(job.path, job.name))

    def attempt(self, work: Callable[[], None]) -> Failure | None:
        """Does it. Returns the failure to write, if it is one."""
        try:
            work()
        except (OSError, RuntimeError, ConfigError) as error:
            return Failure(self.rank, reason(error))
        return None

    def save(self, job: Save) -> Failure | None:
        """The same on all ranks."""
        if job.plan is not None:
            self.plan = job.plan
            self.buffer.map(job.plan.length)
        try:
            return self.save_together(job)
        except RankFailed as failed:
            return failed.failure
        except dist.DistNetworkError:  # the store, which is the first rank's or that of the launcher
            return Failure(0, None)

    def save_together(self, job: Save) -> Failure | None:
        number, agreement, beside = job.number, self.agreement, job.path.with_name(job.path.name + BESIDE)
        if self.rank == 0:
            failure = self.attempt(lambda: begin(beside, job.rest))
            agreement.say(f"{number} begun", said(failure))
        (begun,) = agreement.hear([f"{number} begun"])
        if (failure := heard(begun)) is None:
            agreement.say(f"{number} written {self.rank}", self.write(beside / SHARDS))
            if self.rank == 0:
                agreement.say(f"{number} end", said(self.finish(number, beside, job.path)))
            (end,) = agreement.hear([f"{number} end"])
            failure = heard(end)
        agreement.say(f"{number} heard {self.rank}")
        if self.rank == 0:  # whose training process may end now, and the store with it
            known = [f"{number} heard {rank}" for rank in range(self.ranks)]
            agreement.hear(known)
            agreement.forget([f"{number} begun", f"{number} end", *known])
        return failure

    def write(self, folder: Path) -> bytes:
        """Writes this rank's file. Returns its word for the first rank."""
        ends: list[int] = []
        name = f"__{self.rank}_0.distcp"

        def work() -> None:
            folder.mkdir(exist_ok=True)  # another node may not see yet that it is there
            with open(folder / name, "wb") as file:
                for piece in self.plan.with_numbers():
                    torch.save(piece.within(self.buffer.memory), file)
                    ends.append(file.tell())
                file.flush()
                os.fsync(file.fileno())

        if (failure := self.attempt(work)) is not None:
            return NOT_DONE + str(failure.reason).encode()
        index = zlib.compress(pickle.dumps(index_of_file(self.plan, name, ends)))
        same, self.told = index == self.told, index
        return SAME if same else DONE + index

    def finish(self, number: int, beside: Path, path: Path) -> Failure | None:
        """On the first rank: waits for all shards, describes them, and gives the folder its name."""
        names = [f"{number} written {rank}" for rank in range(self.ranks)]
        try:
            words = self.agreement.hear(names, SLOWEST)
        except Late as late:
            rank = int(late.names[0].split()[-1])
            minutes = SLOWEST.total_seconds() / 60
            return Failure(rank, f"its shards were not written within {minutes:g} minutes after the first rank's")
        self.agreement.forget(names)
        for rank, word in enumerate(words):
            if word.startswith(NOT_DONE):
                self.attempt(lambda: remove(beside))
                return Failure(rank, word.removeprefix(NOT_DONE).decode())

        def work() -> None:
            self.describe(words, beside / SHARDS / ".metadata")
            put_in_place(beside, path)

        return self.attempt(work)

    def describe(self, words: list[bytes], file: Path) -> None:
        """Writes `.metadata`, which is made once for as long as no rank's index changes."""
        if any(word != SAME for word in words):
            from dsv3_lightning.parallel.checkpoints.metadata import metadata_of  # the first rank alone needs torch's

            self.indices = [
                known if word == SAME else word.removeprefix(DONE)
                for word, known in zip(words, self.indices, strict=True)
            ]
            self.metadata = metadata_of(joined([pickle.loads(zlib.decompress(index)) for index in self.indices]))
        file.write_bytes(self.metadata)
        sync_all(file)
        sync_folder(file.parent)
        sync_folder(file.parent.parent)


def begin(beside: Path, rest: bytes) -> None:
    """Makes the folder, with everything but the tensors. Raises OSError."""
    remove(beside)  # left by a run that was killed
    (beside / SHARDS).mkdir(parents=True)
    (beside / REST).write_bytes(rest)
    sync_all(beside / REST)


def said(failure: Failure | None) -> bytes:
    return json.dumps(failure).encode()


def heard(word: bytes) -> Failure | None:
    found = json.loads(word)
    return None if found is None else Failure(*found)


def reason(error: BaseException) -> str:
    found = os_error(error)
    return reason_of(found) if found else " ".join(str(error).split()) or type(error).__name__


def index_of_file(plan: Plan, file: str, ends: list[int]) -> Index:
    """The index of one file. ends: of the pieces that have numbers, in bytes."""
    written = plan.with_numbers()
    dims = max((len(piece.whole) for piece in plan.pieces), default=0)
    bounds = np.array([0, *ends])
    first = np.cumsum([0, *(0 not in piece.sizes for piece in plan.pieces)])
    offsets, sizes = np.zeros((len(written), dims), np.int64), np.ones((len(written), dims), np.int64)
    for row, piece in enumerate(written):
        offsets[row, : len(piece.whole)], sizes[row, : len(piece.whole)] = piece.offsets, piece.sizes
    return Index(
        {piece.name: (piece.whole, piece.dtype) for piece in plan.pieces}, [file], narrow(first),
        narrow(np.zeros(len(written), np.int64)), narrow(bounds[:-1]), narrow(np.diff(bounds)),
        narrow(offsets), narrow(sizes),
    )  # fmt: skip


def listen(connection: Connection, jobs: queue.Queue, group: WriterGroup, parent: int) -> None:
    """Passes jobs on. Ends this process when the training process is gone: others may still have its end open."""
    while os.getppid() == parent:
        try:
            if connection.poll(LOOK_EVERY):
                jobs.put(connection.recv())
        except (EOFError, OSError):
            break
    try:
        Agreement(group, timedelta(seconds=5)).fail(None)  # the store may be gone, too
    finally:
        os._exit(1)


def main() -> None:
    """Arguments: the descriptors of the connection and of the buffer's file, and the training process's id."""
    connected, buffer_file, parent = map(int, sys.argv[1:])
    connection, jobs = Connection(connected), queue.Queue[Save | NameAgain | None]()
    group = connection.recv()
    threading.Thread(target=listen, args=(connection, jobs, group, parent), daemon=True).start()
    try:
        writer = Writer(group, buffer_file)
    except dist.DistError:
        sys.exit(NO_STORE)
    while (job := jobs.get()) is not None:
        result = writer.work(job)
        with suppress(OSError):  # the training process is gone, which `listen` sees
            connection.send(result)


if __name__ == "__main__":
    main()
