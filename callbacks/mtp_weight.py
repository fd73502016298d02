"""The weight λ of the multi-token-prediction loss over the run (V3 §4.2: 0.3 for 10T tokens, then 0.1)."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dsv3_lightning.training.logging import is_log_step, log_scalars, stepped
from dsv3_lightning.training.schedule import check_staircase, staircase


class MTPWeight(Callback):
    """Sets `pl_module.mtp_weight` before each micro-batch, from the share of the run that lies behind.

    schedule: pairs [from share of the run's tokens, λ]. Logs mtp/weight. No state: it follows from the step.
    """

    def __init__(self, schedule: list[list[float]]) -> None:
        check_staircase(schedule, "callbacks.mtp_weight.schedule")
        self.schedule = schedule
        self.weight = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.weight = pl_module.mtp_weight = staircase(self.schedule, trainer.global_step / trainer.max_steps)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if stepped(trainer, batch_idx) and is_log_step(trainer, trainer.global_step):
            log_scalars(trainer, {"mtp/weight": self.weight})
