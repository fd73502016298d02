"""What step each rank is at, before each of its batches."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback


class StepNotes(Callback):
    """Appends the number of steps done to rank<n> in `folder`."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"rank{trainer.global_rank}", "a") as file:
            file.write(f"{trainer.global_step}\n")
