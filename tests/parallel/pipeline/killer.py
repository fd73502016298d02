"""Ends a rank by SIGKILL in a set action of its pipeline, each once, whatever was restarted since."""

import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

ACTIONS = ("F", "B", "I", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B", "REDUCE_GRAD")


class ActionKiller(Callback):
    """kills: [step, action, rank]; the rank dies when it begins its second action of that kind in the step, or its
    first reduction.
    """

    def __init__(self, folder: str, kills: list[list[Any]]) -> None:
        self.folder, self.kills, self.seen = Path(folder), kills, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        step, rank = trainer.global_step + 1, trainer.global_rank
        due = [action for at, action, victim in self.kills if (at, victim) == (step, rank)]
        trainer.strategy.pipeline.watch = self.watch(step, due[0]) if due else None
        self.seen = 0

    def watch(self, step: int, wanted: str) -> Any:
        def look(action: str, stage: int, micro_batch: int | None) -> Any:
            self.seen += action == wanted
            if self.seen == (1 if wanted == "REDUCE_GRAD" else 2):
                self.folder.mkdir(exist_ok=True, parents=True)
                marker = self.folder / f"{step}-{wanted}"
                if not marker.exists():
                    marker.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            return nullcontext()

        return look
