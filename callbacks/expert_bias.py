"""Auxiliary-loss-free load balancing (V3 §2.1.2, eq. 16; arXiv 2408.15664): a bias per expert, moved once per step."""

from collections.abc import Iterator
from typing import Any, Literal, Protocol, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from dsv3_lightning.callbacks.charts import Charts
from dsv3_lightning.callbacks.settings import ExpertBiasSettings
from dsv3_lightning.training.logging import is_last_micro_batch, is_log_step, log_scalars
from dsv3_lightning.training.schedule import Schedule, progress, value_at


class Balanced(Protocol):
    """A router with a bias per expert, fp32 [E]."""

    expert_bias: Tensor


class ExpertBias(Callback):
    """Updates every router's b_i += speed · sign(mean c - c_i) after each optimizer step that was not skipped.

    speed: γ of the report (0.001); u in arXiv 2408.15664.
    schedule: points [from, factor on speed] or [at, factor, linear or cosine]; by: share (of the run), steps or tokens.
        In the report: 1, then 0 for the last 3.4 %.
    rule: `sign`, or `proportional`: b_i += speed · (mean c - c_i) / mean c (arXiv 2408.15664 §4.3).
    centered: subtracts the mean of the update, so that Σ b stays 0; this changes no routing decision.

    Reads outputs["expert_counts"] [L, E] int64: the micro-batch's tokens per expert, one row per module with an
    `expert_bias`, in the model's order. The counts of a step's micro-batches and of all ranks are summed first.
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

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.counts_LE = self.counts_LE + outputs["expert_counts"]
        if not is_last_micro_batch(trainer, batch_idx):
            return
        counts_LE, self.counts_LE = trainer.strategy.reduce(self.counts_LE, reduce_op="sum"), 0
        speed = self.speed * value_at(self.schedule, progress(trainer, trainer.global_step - 1, self.by))
        routers = list(routers_of(pl_module))
        if not getattr(pl_module, "step_skipped", False):
            for router, counts_E in zip(routers, counts_LE, strict=True):
                router.expert_bias += bias_step(counts_E, speed, self.rule, self.centered)
        if is_log_step(trainer, trainer.global_step):
            absmax = max(float(router.expert_bias.abs().max()) for router in routers)
            log_scalars(trainer, {"balance/bias_speed": speed, "balance/bias_absmax": absmax})


def routers_of(module: nn.Module) -> Iterator[Balanced]:
    """The modules that have an `expert_bias`, in the model's order. Raises TypeError where one isn't fp32."""
    for child in module.modules():
        if hasattr(child, "expert_bias"):
            router = cast(Balanced, child)
            if router.expert_bias.dtype != torch.float32:  # in bf16 a step of 0.001 is lost at a bias of 0.5
                raise TypeError(f"expert_bias must stay fp32, but it is {router.expert_bias.dtype}")
            yield router


def bias_step(counts_E: Tensor, speed: float, rule: str = "sign", centered: bool = False) -> Tensor:
    """speed · sign(mean c - c_i), or speed · (mean c - c_i) / mean c; fp32 [E], counts int64.

    The difference is exact: the total minus E · c_i, in integers. The step is 0 if no token was routed.
    """
    missing_E = counts_E.sum() - counts_E * counts_E.numel()
    step_E = torch.sign(missing_E).float() if rule == "sign" else missing_E.double() / counts_E.sum().clamp(min=1)
    return (speed * (step_E - step_E.mean() if centered else step_E)).float()
