"""What step each rank is at, before each of its batches."""

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback


class StepNotes(Callback):
    """Appends the number of steps done to rank<n> in the folder that STEP_NOTES names."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        folder = Path(os.environ["STEP_NOTES"])
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"rank{trainer.global_rank}", "a") as file:
            file.write(f"{trainer.global_step}\n")
