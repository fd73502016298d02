"""Resumable work in tasks, by many processes of one machine and by jobs on several. Imports no torch.

    FOLDER/tasks.json        the list of tasks; a folder with another list is refused
    FOLDER/00000/            a task's output: appears whole, synced to disk
    FOLDER/00000/done.json   what the task counted, and bytes and sha256 of its files

The tasks don't depend on the number of processes and jobs, so neither do their outputs. A task is done once its folder
exists; after a kill only the others are done again. Job i of n does the tasks i, i + n, …. A lock file for each task,
which the operating system releases if the process dies, keeps two processes from doing the same task.
"""

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from dsv3_lightning.common.files import FileRecord, digest, remove_leftovers, utf8_path, whole, write_file
from dsv3_lightning.common.strict_json import strict_json
from dsv3_lightning.data.text.progress import say
from dsv3_lightning.errors import ConfigError, RunStopped

TASKS, DONE = "tasks.json", "done.json"
POLL = 0.2  # seconds

Task = dict[str, Any]  # all that determines its output, as JSON
Counts = dict[str, Any]
Advance = Callable[[int], None]  # called with the bytes of input that have been worked on
Work = Callable[[Task, Path, Advance], Counts]  # writes files into the folder


class Shard(NamedTuple):
    """The job that does the tasks part, part + parts, …: one of `parts` that share a preparation."""

    part: int
    parts: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """The shard of a text such as 0/2. Raises ConfigError."""
        part, slash, parts = text.partition("/")
        if not (slash and part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
            raise ConfigError(f"--shard {text}: must be i/n with i from 0 to n - 1, such as 0/2")
        return cls(int(part), int(parts))

    def __str__(self) -> str:
        return f"{self.part}/{self.parts}"


ALL = Shard(0, 1)


def run_tasks(
    folder: Path,
    tasks: Sequence[Task],
    work: Work,
    jobs: int = 1,
    shard: Shard = ALL,
    *,
    take_over: bool = True,
    advance: Advance = lambda size: None,
) -> list[Counts] | None:
    """Does the unfinished tasks; returns what each of all tasks counted, or None if other jobs have tasks left to do.

    work: writes a task's files into the given empty folder and returns its counts; any importable function, or
        functools.partial of one. With `jobs` > 1 it is called in processes of its own, each with one thread.
    take_over: do the tasks of other jobs too, after one's own, unless a process is at work on them; otherwise wait
        while those jobs are running, and return None if they are not. The first stage of a preparation has False.
    A failure cancels the tasks that have not begun, and keeps what the others write. Raises ConfigError.
    """
    check_list(folder, tasks)
    own = [number for number in range(len(tasks)) if number % shard.parts == shard.part]
    order = own + [number for number in range(len(tasks)) if number % shard.parts != shard.part] * take_over
    done: dict[int, Counts] = {}
    told = False
    with present(folder, shard):
        while True:
            done |= dict(finished(folder, [number for number in order if number not in done]))
            left = [number for number in order if number not in done and not is_held(task_lock(folder, number))]
            if left:
                done |= do(folder, tasks, left, work, jobs, advance)
            others = [number for number in range(len(tasks)) if number not in done]
            done |= dict(finished(folder, others))
            others = [number for number in others if number not in done]
            if not others:
                return [done[number] for number in range(len(tasks))]
            running = {number % shard.parts for number in others if number % shard.parts != shard.part}
            if not take_over and not any(is_held(job_lock(folder, Shard(index, shard.parts))) for index in running):
                if set(own) <= done.keys():
                    return None
            if not told:
                say(f"waiting for another process that prepares {utf8_path(folder)}")
            told = True
            time.sleep(POLL)


def check_list(folder: Path, tasks: Sequence[Task]) -> None:
    """Writes the list of tasks, or raises ConfigError if the folder was begun with another one."""
    path, text = folder / TASKS, strict_json(list(tasks), indent=1, ensure_ascii=False)
    try:
        before = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        write_file(path, text)
        return
    if before != text:
        raise ConfigError(
            f"{utf8_path(folder)}: was begun with {len(json.loads(before))} tasks and now has {len(tasks)} others; "
            "prepare the same files as before, or remove the folder"
        )


def task_folder(folder: Path, number: int) -> Path:
    return folder / f"{number:05}"


def finished(folder: Path, numbers: Sequence[int]) -> Iterator[tuple[int, Counts]]:
    """Yields those tasks that are done, with what they counted."""
    for number in numbers:
        if (record := record_of(task_folder(folder, number))) is not None:
            yield number, record["counts"]


def record_of(folder: Path) -> dict[str, Any] | None:
    """The content of a task's done.json; None if the task isn't done or a file hasn't its size."""
    try:
        record: dict[str, Any] = json.loads((folder / DONE).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == file["bytes"] for name, file in record["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return record if whole else None


def do(
    folder: Path, tasks: Sequence[Task], numbers: Sequence[int], work: Work, jobs: int, advance: Advance
) -> dict[int, Counts]:
    """Does tasks; returns the counts of those that no other process is at work on."""
    if min(jobs, len(numbers)) == 1:
        found = {number: perform(folder, number, tasks[number], work, advance) for number in numbers}
    else:
        found = in_processes(folder, tasks, numbers, work, jobs, advance)
    return {number: counts for number, counts in found.items() if counts is not None}


def perform(folder: Path, number: int, task: Task, work: Work, advance: Advance) -> Counts | None:
    """Does a task, unless it is done; returns its counts, or None if another process is at work on it."""
    path = task_folder(folder, number)
    lock = FileLock(task_lock(folder, number))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    try:
        if (record := record_of(path)) is not None:
            return dict(record["counts"])
        remove_leftovers(folder, f"{path.name}.")
        with whole(path) as beside:
            beside.mkdir()
            counts = work(task, beside, advance)
            files = {file.relative_to(beside).as_posix(): record_file(file) for file in sorted(beside.rglob("*"))
                     if file.is_file()}  # fmt: skip
            (beside / DONE).write_text(strict_json({"counts": counts, "files": files}), encoding="utf-8")
        return counts
    finally:
        lock.release()


def record_file(path: Path) -> FileRecord:
    return {"bytes": path.stat().st_size, "sha256": digest(path)}


def in_processes(
    folder: Path, tasks: Sequence[Task], numbers: Sequence[int], work: Work, jobs: int, advance: Advance
) -> dict[int, Counts | None]:
    context = multiprocessing.get_context("spawn")  # a fork would inherit locks and the threads' state
    progress, told = context.Value("q", 0), 0
    found: dict[int, Counts | None] = {}
    failed: dict[int, BaseException] = {}
    with ProcessPoolExecutor(min(jobs, len(numbers)), context, begin_worker, (folder, work, progress)) as pool:
        waiting: dict[Future[Counts | None], int] = {
            pool.submit(perform_in_worker, number, tasks[number]): number for number in numbers
        }
        while waiting:
            ended, _ = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in ended:
                number = waiting.pop(future)
                if future.cancelled():
                    continue
                if (error := future.exception()) is not None:
                    failed[number] = error
                    for other in waiting:
                        other.cancel()
                else:
                    found[number] = future.result()
            size = int(progress.value)
            advance(size - told)
            told = size
    if failed:
        first = failed[min(failed)]
        if isinstance(first, BrokenProcessPool):
            raise RunStopped(
                f"{utf8_path(folder)}: a process was killed, usually for want of memory; what is done is kept, so run "
                f"it again, with less than --jobs {jobs} if it was the memory"
            ) from first
        raise first
    return found


def begin_worker(folder: Path, work: Work, progress: Any) -> None:
    """Makes a new process ready for tasks: one thread, and an end with the process that started it."""
    global here
    os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

    def advance(size: int) -> None:
        with progress.get_lock():
            progress.value += size

    here = (folder, work, advance)
    threading.Thread(target=end_with_parent, daemon=True).start()


here: tuple[Path, Work, Advance]  # of a worker


def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)


def perform_in_worker(number: int, task: Task) -> Counts | None:
    folder, work, advance = here
    return perform(folder, number, task, work, advance)


def task_lock(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.lock"


def job_lock(folder: Path, shard: Shard) -> Path:
    return folder / f"job-{shard.part}-of-{shard.parts}.lock"


@contextmanager
def present(folder: Path, shard: Shard) -> Iterator[None]:
    """Shows other jobs that this one is running."""
    lock = FileLock(job_lock(folder, shard))
    try:
        lock.acquire(timeout=0)
    except Timeout:  # started twice: the locks of the tasks keep them apart
        yield
        return
    try:
        yield
    finally:
        lock.release()


def is_held(path: Path) -> bool:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False
