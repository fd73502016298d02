"""The progress line: one per logged step, the same on a terminal and in a log file."""

import math
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from dsv3_lightning.training.logging import is_last_micro_batch, is_log_step, latest_values, planned_steps, steps_done

COLUMNS = {  # logged name -> (label, format)
    "loss/main": ("loss", "{:.3f}"),
    "grpo/reward": ("reward", "{:.3f}"),
    "grpo/length": ("length", "{:.1f}"),
    "dpo/accuracy": ("preferred", "{:.0%}"),
    "loss/mtp_1": ("mtp", "{:.3f}"),
    "balance/max_vio": ("max_vio", "{:.2f}"),
    "throughput/tokens_per_second": ("tok/s", "{:,.0f}"),
}
VALIDATION = {
    "val/loss": ("loss", "{:.3f}"),
    "val/bpb": ("bits per byte", "{:.3f}"),
    "val/reward": ("reward", "{:.3f}"),
    "val/accuracy": ("preferred", "{:.0%}"),
    "val/mtp_1": ("mtp", "{:.3f}"),
    "mtp/acceptance_1": ("accepted", "{:.0%}"),
    "balance/max_vio_global": ("max_vio", "{:.2f}"),
}


class Progress(ProgressBar):
    """Prints step, losses, balance, speed and remaining time whenever scalars are logged; only on the first rank.

    The last step is always printed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.start_step, self.start_time = 0, 0.0

    def disable(self) -> None:
        self._is_enabled = False

    def enable(self) -> None:
        self._is_enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start_step, self.start_time = trainer.global_step, time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        steps = planned_steps(trainer)
        last = step == steps
        if not (
            is_last_micro_batch(trainer, batch_idx) and trainer.is_global_zero and (last or is_log_step(trainer, step))
        ):
            return
        scalars = latest_values(trainer) if is_log_step(trainer, step) else {}  # else they are an earlier step's
        parts = [f"{label} {form.format(scalars[name])}" for name, (label, form) in COLUMNS.items() if name in scalars]
        if math.isinf(steps) or step <= self.start_step:
            print(f"step {step}", *parts, sep="  ", flush=True)
            return
        seconds = (time.monotonic() - self.start_time) / (step - self.start_step) * (steps - step)
        print(f"step {step}/{steps}", *parts, f"{clock(seconds)} left", sep="  ", flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            scalars = latest_values(trainer)
            parts = [
                f"{label} {form.format(scalars[name])}" for name, (label, form) in VALIDATION.items() if name in scalars
            ]
            print(f"validation after step {steps_done(trainer)}:", *parts, sep="  ", flush=True)


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour.

    >>> clock(3725), clock(59.6)
    ('1:02:05', '1:00')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
