"""Tasks over processes and jobs: each is done once, whole or not at all, and the outputs are always the same."""

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from dsv3_lightning.data.stages import tasks as engine
from dsv3_lightning.data.stages.tasks import DONE, Advance, Counts, Shard, Task, run_tasks, task_folder, task_lock
from dsv3_lightning.errors import ConfigError, WriteError

TASKS = [{"text": letter, "bytes": 10} for letter in "abcdefg"]


def double(task: Task, folder: Path, advance: Advance, log: str | None = None) -> Counts:
    """Writes the text twice, in a file and in a folder."""
    if log is not None:
        with open(log, "a") as file:
            file.write(task["text"])
    (folder / "inside").mkdir()
    (folder / "inside" / "text").write_text(2 * task["text"])
    (folder / "again").write_text(task["text"])
    advance(task["bytes"])
    return {"length": len(task["text"]), "process": 0}


def fail_at_c(task: Task, folder: Path, advance: Advance) -> Counts:
    (folder / "half").write_text("half")
    if task["text"] == "c":
        raise ConfigError("data.paths: c is bad")
    return double(task, folder, advance)


def full_disk(task: Task, folder: Path, advance: Advance) -> Counts:
    (folder / "half").write_text("half")
    raise OSError(28, "No space left on device")


def die_at_c(task: Task, folder: Path, advance: Advance) -> Counts:
    if task["text"] == "c":
        os.kill(os.getpid(), signal.SIGKILL)
    return double(task, folder, advance)


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def logged(folder: Path) -> tuple[Any, Path]:
    log = folder / "log"
    return functools.partial(double, log=str(log)), log


def test_each_task_has_a_folder_with_what_it_wrote_and_counted(tmp_path: Path) -> None:
    told: list[int] = []
    counts = run_tasks(tmp_path / "stage", TASKS, double, advance=told.append)
    assert counts == [{"length": 1, "process": 0}] * 7 and sum(told) == 70
    record = json.loads((tmp_path / "stage/00002" / DONE).read_text())
    assert record["files"].keys() == {"again", "inside/text"} and record["files"]["inside/text"]["bytes"] == 2
    assert (tmp_path / "stage/00002/inside/text").read_text() == "cc"


def test_processes_give_the_same_files_as_one(tmp_path: Path) -> None:
    told: list[int] = []
    counts = run_tasks(tmp_path / "one", TASKS, double)
    assert run_tasks(tmp_path / "two", TASKS, double, jobs=2, advance=told.append) == counts
    assert contents(tmp_path / "one") == contents(tmp_path / "two") and sum(told) == 70


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    work, log = logged(tmp_path)
    with pytest.raises(ConfigError, match="^data.paths: c is bad$"):
        run_tasks(tmp_path / "stage", TASKS, fail_at_c)
    assert not [path for path in (tmp_path / "stage").rglob("half") if path.parent.name not in ("00000", "00001")]
    (tmp_path / "stage/00001/again").write_text("longer than it was")
    run_tasks(tmp_path / "stage", TASKS, work)
    assert log.read_text() == "bcdefg"
    run_tasks(tmp_path / "stage", TASKS, work)
    assert log.read_text() == "bcdefg"


@pytest.mark.slow
def test_a_failure_in_a_process_is_the_same_error_and_keeps_what_the_others_did(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="^data.paths: c is bad$"):
        run_tasks(tmp_path, TASKS[:3], fail_at_c, jobs=2)
    assert (tmp_path / "00000" / DONE).exists() and not (tmp_path / "00002").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"00000: can't be written \(No space left on device\)$"):
        run_tasks(tmp_path, TASKS, full_disk)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == ["tasks.json"]


@pytest.mark.slow
def test_a_killed_process_is_reported_and_the_rest_is_done_by_the_next_start(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a process was killed, usually for want of memory"):
        run_tasks(tmp_path / "killed", TASKS, die_at_c, jobs=2)
    run_tasks(tmp_path / "killed", TASKS, double)
    run_tasks(tmp_path / "whole", TASKS, double)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".*"))


@pytest.mark.parametrize("other", [TASKS[:6], [*TASKS[:6], {"text": "h", "bytes": 10}]])
def test_another_list_of_tasks_is_refused(tmp_path: Path, other: list[Task]) -> None:
    run_tasks(tmp_path, TASKS, double)
    with pytest.raises(ConfigError, match=f"begun with 7 tasks and now has {len(other)} others"):
        run_tasks(tmp_path, other, double)


def test_two_jobs_do_their_own_halves_and_equal_one(tmp_path: Path) -> None:
    work, log = logged(tmp_path)
    halves = [Shard.parse("0/2"), Shard.parse("1/2")]
    assert run_tasks(tmp_path / "two", TASKS, work, shard=halves[0], take_over=False) is None
    assert log.read_text() == "aceg"
    counts = run_tasks(tmp_path / "two", TASKS, work, shard=halves[1], take_over=False)
    assert log.read_text() == "acegbdf"
    assert counts == run_tasks(tmp_path / "one", TASKS, double)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert run_tasks(tmp_path / "two", TASKS, work, shard=halves[0], take_over=False) == counts


def test_a_job_that_takes_over_begins_with_its_own_tasks(tmp_path: Path) -> None:
    work, log = logged(tmp_path)
    assert run_tasks(tmp_path / "stage", TASKS, work, shard=Shard(1, 2)) is not None
    assert log.read_text() == "bdfaceg"


def test_a_task_that_another_process_holds_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, log = logged(tmp_path)
    monkeypatch.setattr(engine, "POLL", 0.01)
    folder = tmp_path / "stage"
    folder.mkdir()
    lock = FileLock(task_lock(folder, 2))
    lock.acquire()
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(run_tasks(folder, TASKS, work)))
    thread.start()
    while not task_folder(folder, 6).exists():
        time.sleep(0.01)
    assert log.read_text() == "abdefg" and thread.is_alive()
    lock.release()
    thread.join()
    assert log.read_text() == "abdefgc" and len(result[0]) == 7


SLOW = """
import sys, time
from pathlib import Path
from dsv3_lightning.data.stages.tasks import run_tasks
def work(task, folder, advance):
    Path(task["pids"], f"{__import__('os').getpid()}").touch()
    time.sleep(60)
if __name__ == "__main__":
    run_tasks(Path(sys.argv[1]), [{"pids": sys.argv[2], "n": n} for n in range(4)], work, jobs=2)
"""


@pytest.mark.slow
def test_processes_end_when_the_one_that_started_them_is_killed(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    (pids := tmp_path / "pids").mkdir()
    command = [sys.executable, str(tmp_path / "slow.py"), str(tmp_path / "stage"), str(pids)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    while len(list(pids.iterdir())) < 2:
        time.sleep(0.05)
    process.kill()
    process.wait()
    for path in pids.iterdir():
        while alive(int(path.name)):  # the test's own time limit ends it
            time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("text", ["2/2", "1", "-1/2", "a/b", "0/0", "1/"])
def test_a_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must be i/n with i from 0 to n - 1"):
        Shard.parse(text)
