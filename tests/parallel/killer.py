"""Ends a rank by SIGKILL at set moments, each once, whatever was restarted since."""

import os
import re
import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from torch.distributed.checkpoint import FileSystemWriter


class Killer(Callback):
    """kills: [step, moment, rank]; moment is `step` (before it), `validation` (after it) or `save` (its checkpoint)."""

    def __init__(self, folder: str, kills: list[list[Any]]) -> None:
        self.folder, self.kills = Path(folder), kills

    def kill(self, step: int, moment: str, rank: int) -> None:
        if [step, moment, rank] not in self.kills:
            return
        self.folder.mkdir(exist_ok=True)
        marker = self.folder / f"{step}-{moment}-{rank}"
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_start(self, trainer, pl_module):
        write = FileSystemWriter.write_data

        def write_or_die(writer, plan, planner):
            if found := re.search(r"/step=(\d+)\.ckpt\.new/", f"{writer.path}/"):
                self.kill(int(found[1]), "save", trainer.global_rank)
            return write(writer, plan, planner)

        FileSystemWriter.write_data = write_or_die

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.kill(trainer.global_step + 1, "step", trainer.global_rank)

    def on_validation_start(self, trainer, pl_module):
        self.kill(trainer.global_step, "validation", trainer.global_rank)
