"""A callback that stops a run once, named by class_path."""

import os
import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class StopOnce(Callback):
    """Sends this process SIGINT during the given step, in the run's first session only."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        mark = Path(trainer.default_root_dir) / "stopped-once"
        if trainer.global_step + 1 == self.step and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGINT)
