"""Overhead of router metrics: a laptop run in which RouterMonitor is off in every other window of ten steps.

Run: python benchmarks/metrics.py [--windows 24] [--threads N]

Windows with and without RouterMonitor alternate within one run, so other load on the machine slows both. A window has
trainer.log_every_n_steps steps, so it includes one log of all statistics.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from typing import Any

import torch
from lightning.pytorch import Callback

from dsv3_lightning import callbacks
from dsv3_lightning.cli import main as dsv3

WINDOW = 10


class Switched(callbacks.RouterMonitor):
    """A RouterMonitor that is off in every other window."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.inside: dict[int, float] = {}  # window -> seconds in this callback
        CREATED.append(self)

    def measured(self, window: int, hook: Any, *arguments: Any) -> None:
        if window % 2 == 0:
            start = time.perf_counter()
            hook(*arguments)
            self.inside[window] = self.inside.get(window, 0.0) + time.perf_counter() - start

    def on_before_optimizer_step(self, trainer: Any, *others: Any) -> None:
        self.measured(trainer.global_step // WINDOW, super().on_before_optimizer_step, trainer, *others)

    def on_train_batch_end(self, trainer: Any, *others: Any) -> None:
        self.measured((trainer.global_step - 1) // WINDOW, super().on_train_batch_end, trainer, *others)


class Clock(Callback):
    """Records the time at which each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        CLOCKS.append(self)

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())


CREATED: list[Switched] = []
CLOCKS: list[Clock] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=24, help="at least 4; default %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if arguments.windows < 4:
        parser.error(
            f"--windows {arguments.windows}: must be at least 4, for a window with metrics between two without"
        )
    torch.set_num_threads(arguments.threads)
    callbacks.RouterMonitor = Switched
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as output:
        code = dsv3(
            [
                "run", "laptop", f"run.dir={folder}", f"trainer.max_steps={arguments.windows * WINDOW}",
                f"trainer.log_every_n_steps={WINDOW}", "trainer.val_check_interval=1000000",
                "trainer.limit_val_batches=0", "callbacks.router_monitor.every_n_steps=1000000",
                "callbacks.router_probe=null", "callbacks.run_report=null", "callbacks.checkpoint=null",
                "callbacks.sample_text=null", "callbacks.clock={class_path: __main__.Clock}",
                f"data.cache_dir={tempfile.gettempdir()}/dsv3-metrics-data",
            ]
        )  # fmt: skip
    if code:
        raise SystemExit(output.getvalue())
    monitor, ends = CREATED[0], CLOCKS[0].ends
    seconds = [ends[n + WINDOW - 1] - ends[n - 1] for n in range(WINDOW, len(ends) - WINDOW + 1, WINDOW)]
    seconds = {number: value for number, value in enumerate(seconds, start=1)}  # the first window warms up
    pairs = [(seconds[n], (seconds[n - 1] + seconds[n + 1]) / 2) for n in seconds if n % 2 == 0 and n + 1 in seconds]
    shares = [monitor.inside[n] / seconds[n] for n in seconds if n % 2 == 0]
    print(f"{arguments.windows} windows of {WINDOW} steps, {arguments.threads} threads")
    print(
        f"a step: {statistics.median(with_it for with_it, _ in pairs) / WINDOW * 1e3:.1f} ms with, "
        f"{statistics.median(without for _, without in pairs) / WINDOW * 1e3:.1f} ms without"
    )
    print(f"with / without, pairs: median {statistics.median(one / other for one, other in pairs) - 1:+.2%}")
    print(f"time inside the metrics' own code: {statistics.median(shares):.2%} of a step (median of windows)")


if __name__ == "__main__":
    main()
