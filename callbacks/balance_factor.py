"""A schedule for the weight α of the balance losses (V3 §4.2 keeps it constant)."""

from typing import Any

from lightning.pytorch import Callback, Trainer

from dsv3_lightning.callbacks.charts import Charts
from dsv3_lightning.callbacks.settings import BalanceFactorSettings
from dsv3_lightning.training.logging import is_last_micro_batch, is_log_step, log_scalars
from dsv3_lightning.training.schedule import Schedule, progress, value_at


class BalanceFactor(Callback):
    """Sets `pl_module.balance.scale`, a factor on every α, before each micro-batch.

    schedule: points [from, factor] or [at, factor, linear or cosine]; by: share (of the run), steps or tokens.
    Logs balance/factor if the run has a balance loss. Stateless: the factor is computed from the step.
    """

    def __init__(self, schedule: Schedule = ((0.0, 1.0),), by: str = "share") -> None:
        BalanceFactorSettings(schedule=schedule, by=by)
        self.schedule, self.by = schedule, by

    @staticmethod
    def charts(tree: dict[str, Any], origins: int) -> Charts:
        return {"balance_factor": ["balance/factor"]} if tree["loss"]["balance"] not in ("none", ["none"]) else {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.balance.scale = value_at(self.schedule, progress(trainer, trainer.global_step, self.by))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (
            pl_module.balance.factors
            and is_last_micro_batch(trainer, batch_idx)
            and is_log_step(trainer, trainer.global_step)
        ):
            log_scalars(trainer, {"balance/factor": float(pl_module.balance.scale)})
