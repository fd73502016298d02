"""The measured bubble of real pipelines on two processes, beside the simulation that their measured times feed.

python benchmarks/bubble.py [--sleep MS]

Each run is `dsv3 run` on two CPU processes over gloo with `callbacks.pipeline_trace`: the real schedule, messages and
gradients of a small model. With --sleep (the default), each pass also sleeps, so that its time is known and two cores
that other processes use, too, matter little; a forward pass and each part of a backward pass sleep MS, a whole backward
pass twice that. With --sleep 0 the model is wider and only computes, which measures the machine as much as the
schedule.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dsv3_lightning.common.schedules import SCHEDULES
from dsv3_lightning.common.table import table
from dsv3_lightning.parallel.data_ranks import pipeline_of
from dsv3_lightning.planning.pipeline.measured import measured_times, read_trace, simulated

ALLOWED = 0.15
STEPS, EVERY, MICRO_BATCHES = 4, 1, 4
PARTS = {"F": 1, "I": 1, "W": 1, "B": 2}  # of --sleep
SMALL = ("model.num_hidden_layers=8", "data.sequence_length=16", "data.batch_size=4", "trainer.precision=32")
WIDE = (
    "model.num_hidden_layers=8", "model.hidden_size=256", "model.intermediate_size=512", "data.sequence_length=128",
    "data.batch_size=16", "trainer.precision=32",
)  # fmt: skip


class SleepingPasses(Callback):
    """Makes each recorded pass longer by a sleep. seconds: of a forward pass."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        pipeline = pipeline_of(trainer.strategy)
        if pipeline is None or pipeline.watch is None:  # this step isn't recorded
            return
        inner = pipeline.watch

        @contextmanager
        def watch(action: str, stage: int, micro_batch: int | None) -> Iterator[None]:
            with inner(action, stage, micro_batch):
                yield
                time.sleep(self.seconds * PARTS.get(action, 0))

        pipeline.watch = watch


def measure(schedule: str, sleep: float, folder: Path) -> tuple[float, float]:
    """The bubble share of the traced step that took least, and that of the simulation with its chunks' median times."""
    words = [
        "nano", *(SMALL if sleep else WIDE), f"run.dir={folder}", f"run.name={schedule}", f"trainer.max_steps={STEPS}",
        f"strategy={{kind: fsdp2, pipeline_parallel: 2, schedule: {schedule}, micro_batches: {MICRO_BATCHES}}}",
        "trainer.devices=2", f"trainer.val_check_interval={STEPS}", "trainer.limit_val_batches=1",
        "callbacks.sample_text=null", f"callbacks.pipeline_trace={{every_n_steps: {EVERY}, keep: {STEPS}}}",
        f"data.paths=[{Path(json.__file__).parent}]", f"data.cache_dir={folder / 'data'}",
    ]  # fmt: skip
    if sleep:
        arguments = json.dumps({"seconds": sleep})
        words.append(f"callbacks.sleeping={{class_path: bubble.SleepingPasses, init_args: {arguments}}}")
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-m", "dsv3_lightning", "run", *words], env=environment, text=True,
                          capture_output=True, check=False)  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{schedule}: {done.stdout}{done.stderr}")
    found = list(read_trace(folder / schedule).values())[1:]  # the first step is the warm-up
    best = min(found, key=lambda timeline: timeline.span)  # other processes disturbed it least
    return best.bubble_share, simulated(best, measured_times([best])).bubble_share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sleep", type=float, default=600, metavar="MS", help="of a pass; 0: none; default %(default)s"
    )
    parser.add_argument("schedules", nargs="*", metavar="NAME", help=f"{', '.join(SCHEDULES)}; default: all")
    arguments = parser.parse_args()
    sleep, schedules = arguments.sleep / 1e3, arguments.schedules
    rows = [("schedule", "measured", "simulated", "difference", "")]
    with TemporaryDirectory() as folder:
        for schedule in schedules or SCHEDULES:
            measured, expected = measure(schedule, sleep, Path(folder))
            off = measured / expected - 1
            verdict = "" if abs(off) <= ALLOWED else f"off by more than {ALLOWED:.0%}"
            rows.append((schedule, f"{measured:.1%}", f"{expected:.1%}", f"{off:+.1%}", verdict))
            print(rows[-1], file=sys.stderr)
    print(f"share of the fastest of {STEPS - 1} steps in which two ranks wait; {MICRO_BATCHES} micro-batches")
    print(f"load of the machine: {os.getloadavg()[0]:.0f}")
    print(table(rows))


if __name__ == "__main__":
    main()
