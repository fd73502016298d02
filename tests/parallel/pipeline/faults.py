"""Pipelines of which a rank is killed in an action: for tests and benchmarks."""

import re
import time
from pathlib import Path

import psutil

from tests.conftest import Nano, Run
from tests.parallel.conftest import under_torchrun
from tests.parallel.pipeline.cases import COMMON

SETTINGS = (
    *COMMON[1:], "callbacks.sample_text=null", "trainer.log_every_n_steps=1", "trainer.val_check_interval=50",
    "callbacks.checkpoint={every_n_steps: 1, keep: 2, keep_best: 0}",
)  # fmt: skip


def strategy(schedule: str, stages: int) -> str:
    return f"strategy={{kind: fsdp2, pipeline_parallel: {stages}, schedule: {schedule}, sharded_checkpoints: true}}"


def killer(folder: Path, kills: list[tuple[int, str, int]]) -> str:
    shown = ", ".join(f"[{step}, {action}, {rank}]" for step, action, rank in kills)
    return ("callbacks.killer={class_path: tests.parallel.pipeline.killer.ActionKiller, init_args: "
            f"{{folder: {folder}, kills: [{shown}]}}}}")  # fmt: skip


def pipeline_under_torchrun(nano: Nano, name: str, ranks: int, schedule: str, steps: int, *more: str) -> Run:
    words = (*SETTINGS, strategy(schedule, ranks), f"trainer.devices={ranks}", f"trainer.max_steps={steps}", *more)
    return under_torchrun(nano, name, words, ranks, restarts=20, timeout=900)


def kill_once(nano: Nano, name: str, ranks: int, schedule: str, action: str, victim: int) -> tuple[str, float]:
    """Lets Lightning start the ranks; the victim dies in step 2. Returns the line about it, and the seconds to the end.

    Raises AssertionError where a process was left after a minute, or there was no line. If the first rank takes longer
    than `launcher.PATIENCE` to end, its observer ends it, and has a line itself.
    """
    folder = nano.base / "kills" / name
    words = (*SETTINGS, strategy(schedule, ranks), f"trainer.devices={ranks}", "trainer.max_steps=9",
             killer(folder, [(2, action, victim)]))  # fmt: skip
    process, family = nano.start(name, *words), []
    while process.poll() is None and not (folder / f"2-{action}").exists():
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        time.sleep(0.05)
    begun = time.monotonic()
    output, _ = process.communicate(timeout=60)
    _, alive = psutil.wait_procs(family, timeout=5)
    assert len(family) >= ranks and not alive, output
    seconds = time.monotonic() - begun
    lines = [
        line for line in output.splitlines() if re.match(r"dsv3: rank \d+ stops: |\[rank: \d+\] Child process", line)
    ]
    observed = any("Child process" in line for line in lines)
    assert process.returncode == (-9 if observed or victim == 0 else 1), (process.returncode, output)
    assert lines and "Traceback" not in output and "Schedule" not in output, output
    return lines[0], seconds
