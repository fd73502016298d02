"""Ends a rank by SIGKILL at set moments, each once, whatever was restarted since."""

import os
import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from dsv3_lightning.parallel.checkpoints.names import STEP_FILE
from dsv3_lightning.parallel.checkpoints.saving import Saver


class Killer(Callback):
    """kills: [step, moment, rank]; moment is `step` (before it), `validation` (after it) or `save` (its checkpoint,
    which other ranks write already). Before the first two, checkpoints of earlier steps are whole."""

    def __init__(self, folder: str, kills: list[list[Any]]) -> None:
        self.folder, self.kills = Path(folder), kills

    def kill(self, step: int, moment: str, rank: int) -> None:
        if [step, moment, rank] not in self.kills:
            return
        self.folder.mkdir(exist_ok=True)
        marker = self.folder / f"{step}-{moment}-{rank}"
        if not marker.exists():
            if moment != "save":
                self.finish_saving()
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_start(self, trainer, pl_module):
        self.finish_saving = getattr(trainer.strategy, "finish_saving", lambda: None)
        send = Saver.send

        def send_or_die(saver, job, path):
            if found := STEP_FILE.fullmatch(path.name):
                self.kill(int(found[1]), "save", trainer.global_rank)
            send(saver, job, path)

        Saver.send = send_or_die

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.kill(trainer.global_step + 1, "step", trainer.global_rank)

    def on_validation_start(self, trainer, pl_module):
        self.kill(trainer.global_step, "validation", trainer.global_rank)
