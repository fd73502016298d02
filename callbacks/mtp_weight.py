"""A schedule for the weight λ of the multi-token-prediction loss (V3 §4.2: 0.3 for 10T tokens, then 0.1)."""

from typing import Any

from lightning.pytorch import Callback, Trainer

from dsv3_lightning.callbacks.charts import Charts
from dsv3_lightning.callbacks.settings import MTPWeightSettings
from dsv3_lightning.training.logging import is_last_micro_batch, is_log_step, log_scalars
from dsv3_lightning.training.schedule import Schedule, progress, value_at


class MTPWeight(Callback):
    """Sets `pl_module.mtp_weight` before each micro-batch from the progress of the run.

    schedule: points [from, λ] or [at, λ, linear or cosine]; by: share (of the run), steps or tokens.
    Needs `pl_module.model` (a Transformer). Logs mtp/weight if the model has MTP modules. Stateless: the weight is
    computed from the step.
    """

    def __init__(self, schedule: Schedule = ((0.0, 0.3), (0.676, 0.1)), by: str = "share") -> None:
        MTPWeightSettings(schedule=schedule, by=by)
        self.schedule, self.by = schedule, by
        self.weight = 0.0

    @staticmethod
    def charts(tree: dict[str, Any], origins: int) -> Charts:
        return {"mtp_weight": ["mtp/weight"]} if tree["model"]["num_nextn_predict_layers"] else {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.weight = pl_module.mtp_weight = value_at(self.schedule, progress(trainer, trainer.global_step, self.by))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        depth = pl_module.model.config.mtp_depth
        if depth and is_last_micro_batch(trainer, batch_idx) and is_log_step(trainer, trainer.global_step):
            log_scalars(trainer, {"mtp/weight": self.weight})
