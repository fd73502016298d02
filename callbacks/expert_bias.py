"""Auxiliary-loss-free load balancing (V3 §2.1.2, eq. 16; arXiv 2408.15664): a bias per expert, moved once per step."""

from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from dsv3_lightning.callbacks.charts import Charts
from dsv3_lightning.callbacks.protocol import (
    all_biases,
    expert_counts,
    name_of,
    own_rows,
    require_routers,
    require_unit,
    routers_of,
)
from dsv3_lightning.callbacks.settings import ExpertBiasSettings
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.parallel.data_ranks import sum_over_data
from dsv3_lightning.training.logging import is_last_micro_batch, is_log_step, log_scalars
from dsv3_lightning.training.schedule import Schedule, progress, value_at


class ExpertBias(Callback):
    """Updates every router's b_i += speed · sign(mean c - c_i) after each optimizer step that was not skipped.

    speed: γ of the report (0.001); u in arXiv 2408.15664.
    schedule: points [from, factor on speed] or [at, factor, linear or cosine]; by: share (of the run), steps or tokens.
        In the report: 1, then 0 for the last 3.4 %.
    rule: `sign`, or `proportional`: b_i += speed · (mean c - c_i) / mean c (arXiv 2408.15664 §4.3).
    centered: subtracts the mean of the update, so that Σ b stays 0; this changes no routing decision.

    Reads outputs["expert_counts"], int64 [L, E]: the micro-batch's tokens per expert, one row per module with an
    `expert_bias`, in the model's order, also for those of a pipeline's other ranks. The counts of a step's
    micro-batches and of all ranks are summed first.
    Logs balance/bias_speed and balance/bias_absmax. The only state is the buffers, which the model saves.
    """

    def __init__(
        self,
        speed: float = 1e-3,
        schedule: Schedule = ((0.0, 1.0), (0.966, 0.0)),
        by: str = "share",
        rule: Literal["sign", "proportional"] = "sign",
        centered: bool = False,
    ) -> None:
        ExpertBiasSettings(speed=speed, schedule=schedule, by=by, rule=rule, centered=centered)
        self.speed, self.schedule, self.by, self.rule, self.centered = speed, schedule, by, rule, centered
        self.counts_LE: Tensor | int = 0

    @staticmethod
    def charts(tree: dict[str, Any], origins: int) -> Charts:
        return {"bias": ["balance/bias_absmax"], "bias_speed": ["balance/bias_speed"]}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        require_routers(trainer, pl_module, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        require_unit(trainer, self, self.by)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.counts_LE = self.counts_LE + expert_counts(outputs, self, pl_module)
        if not is_last_micro_batch(trainer, batch_idx):
            return
        counts_LE, self.counts_LE = sum_over_data(trainer.strategy, self.counts_LE), 0
        speed = self.speed * value_at(self.schedule, progress(trainer, trainer.global_step - 1, self.by))
        routers, rows = list(routers_of(pl_module)), own_rows(trainer)
        counts_LE = counts_LE if rows is None else counts_LE[rows]
        if any(len(router.expert_bias) != counts_LE.shape[1] for router in routers) or len(routers) != len(counts_LE):
            raise ConfigError(
                f"ExpertBias needs a row of `expert_counts` for each `expert_bias` of {name_of(pl_module)}: "
                f"found {list(counts_LE.shape)} for biases of {[len(router.expert_bias) for router in routers]}"
            )
        biases = [router.expert_bias for router in routers]
        if routers and not getattr(pl_module, "step_skipped", False):
            steps_LE = bias_step(counts_LE, speed, self.rule, self.centered)  # a few launches for all layers
            torch._foreach_add_(biases, list(steps_LE))
        if is_log_step(trainer, trainer.global_step):
            absmax = float(all_biases(trainer, pl_module).abs().max())
            log_scalars(trainer, {"balance/bias_speed": speed, "balance/bias_absmax": absmax})


def bias_step(counts: Tensor, speed: float, rule: str = "sign", centered: bool = False) -> Tensor:
    """speed · sign(mean c - c_i), or speed · (mean c - c_i) / mean c; fp32, counts int64 [E], or [L, E] of L layers.

    The difference is exact: the total minus E · c_i, in integers. The step is 0 if no token was routed.
    """
    total = counts.sum(-1, keepdim=True)
    missing = total - counts * counts.shape[-1]
    step = torch.sign(missing).float() if rule == "sign" else missing.double() / total.clamp(min=1)
    return (speed * (step - step.mean(-1, keepdim=True) if centered else step)).float()
