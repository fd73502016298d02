"""`dsv3 sweep`: runs an experiment, one or several runs at a time, on this machine or as a SLURM array."""

import argparse
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dsv3_lightning.common.flags import jobs_argument
from dsv3_lightning.common.paths import display_path
from dsv3_lightning.config.schema import to_tree
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.runs.changes import shown_differences
from dsv3_lightning.runs.record import RunFolder, read_report
from dsv3_lightning.studies.experiment import Experiment, Task


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="+", metavar="EXPERIMENT", help="a file or a shipped experiment; then key=value for all runs"
    )
    jobs_argument(parser)
    parser.add_argument("--task", type=int, metavar="N", help="only run N, counted from 0")
    parser.add_argument("--slurm", action="store_true", help="print a SLURM batch script and exit")


def run(words: list[str], jobs: int, task: int | None, slurm: bool) -> int:
    """Runs the unfinished runs; returns 0 if all are finished, else 1. words: the experiment, then key=value overrides.

    Each run is a separate process with an equal share of the cores and logs to `<run>.log` next to its folder. A failed
    run doesn't stop the others. task: index of the only run to run. slurm: print a batch script and write nothing.
    """

    experiment = Experiment(words[0], words[1:])
    tasks = experiment.tasks()
    if slurm:
        print(slurm_script(words, len(tasks), experiment.path.stem))
        return 0
    if task is not None:
        if not 0 <= task < len(tasks):
            raise ConfigError(f"--task {task}: {experiment.path.name} has runs 0 to {len(tasks) - 1}")
        tasks = [tasks[task]]
    for one in tasks:
        one.write_variant()
    shown = display_path(experiment.folder)
    print(f"{experiment.path.stem}: {len(tasks)} runs below {shown}, {jobs} at a time", flush=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            codes = list(pool.map(lambda one: run_task(one, experiment.folder, threads), tasks))
        except KeyboardInterrupt:  # the runs also received it; they save and stop
            pool.shutdown(cancel_futures=True)
            raise
    failed = [one.name for one, code in zip(tasks, codes, strict=True) if code]
    if failed:
        print(f"failed: {', '.join(failed)}; the same command tries them again", file=sys.stderr)
        return 1
    print(f"next: dsv3 compare {shown}", flush=True)
    return 0


def run_task(task: Task, folder: Path, threads: int) -> int:
    """Runs one task to its end unless it is finished with these settings. Returns the exit status."""
    report = read_report(folder / task.name)
    if report is not None:
        try:
            refuse_other_settings(task)
        except ConfigError as error:
            print(f"{task.name}: failed: {error}", flush=True)
            return 2
        print(f"{task.name}: finished before, {outcome(report)}", flush=True)
        return 0
    start, log = time.monotonic(), folder / f"{task.name}.log"
    command = [sys.executable, "-m", "dsv3_lightning", "run", *task.files, *task.overrides]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    with open(log, "ab") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    seconds = time.monotonic() - start
    report = read_report(folder / task.name)
    if code == 0 and report is not None:
        print(f"{task.name}: {outcome(report)}, {seconds:.0f} s", flush=True)
        return 0
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    how = f"failed with exit status {code}" if code else "did not come to its last step"
    print(f"{task.name}: {how} after {seconds:.0f} s, see {display_path(log)}: {' '.join(last)}", flush=True)
    return code or 1


def refuse_other_settings(task: Task) -> None:
    """Raises ConfigError if the task's folder has a run with other settings."""
    run = RunFolder(task.config)
    if differing := shown_differences(run.stored_tree() or {}, to_tree(task.config)):
        raise ConfigError(f"{run.path}: was run with other settings ({differing}); use those, or another folder")


def outcome(report: dict[str, Any]) -> str:
    vio = report["max_vio_global"]
    balance = f", max_vio {sum(vio) / len(vio):.2f}" if vio else ""
    return f"loss {report['val_loss']:.3f}{balance}" if report["val_loss"] is not None else "no validation"


def slurm_script(words: list[str], tasks: int, name: str) -> str:
    """A batch script for a job array with one run per task; a requeued task resumes from its checkpoint.

    SLURM opens a task's log before the task starts, so the log is in the current folder, which exists.
    """
    command = shlex.join([sys.executable, "-m", "dsv3_lightning", "sweep", *words, "--task"])
    return (
        "#!/bin/bash\n"
        f"#SBATCH --job-name={name}\n"
        f"#SBATCH --array=0-{tasks - 1}\n"
        f"#SBATCH --output=slurm-{name}-%a.log\n"
        "#SBATCH --signal=TERM@120\n"
        "#SBATCH --requeue\n"
        f"cd {shlex.quote(str(Path.cwd()))}\n"
        f"exec {command} $SLURM_ARRAY_TASK_ID"
    )
