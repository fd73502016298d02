"""What the routers do: load per expert, MaxVio, bias; as scalars, and as heat maps of layers × experts."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from dsv3_lightning.callbacks.expert_bias import routers_of
from dsv3_lightning.callbacks.plots import heat_map
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.training.logging import is_log_step, log_scalars, stepped
from dsv3_lightning.training.metrics import MaxVio, max_vio


class RouterMonitor(Callback):
    """Reads outputs["expert_counts"] [L, E] int64, in training and in validation.

    Logs, averaged over the steps since the last log: balance/max_vio (mean over layers) and
    balance/max_vio_layer_<l> (MoE layers numbered from 0, MTP modules last), each step's from its whole global batch;
    balance/load_max and balance/load_min, the busiest and the idlest expert's share of its fair load.
    After a validation, from counts over the whole set: balance/max_vio_global and balance/max_vio_global_layer_<l>.
    Every `every_n_steps`: heat maps of relative load and of the expert bias.
    """

    def __init__(self, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ConfigError(f"callbacks.router_monitor.every_n_steps={every_n_steps}: must be at least 1")
        self.every_n_steps = every_n_steps
        self.step_counts: Tensor | int = 0
        self.window: list[Tensor] = []  # a step's [L, E] each, since the last log; one all-reduce for all of them
        self.recent: list[float] = []  # batch-wise MaxVio of the last 50 steps, for the report
        self.val_max_vio: MaxVio | None = None
        self.max_vio_global: list[float] | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step_LE = self.step_counts + outputs["expert_counts"]
        if not stepped(trainer, batch_idx):
            self.step_counts = step_LE
            return
        self.window.append(step_LE)
        self.step_counts = 0
        draw = trainer.global_step % self.every_n_steps == 0
        if not (draw or is_log_step(trainer, trainer.global_step)):
            return
        counts_SLE = trainer.strategy.reduce(torch.stack(self.window), reduce_op="sum")
        self.window.clear()
        vio_SL = max_vio(counts_SLE)
        self.recent = [*self.recent, *vio_SL.mean(1).tolist()][-50:]
        counts_LE = counts_SLE.sum(0).double()
        load_LE = counts_LE / counts_LE.mean(1, keepdim=True).clamp(min=1e-9)
        values = {
            "balance/max_vio": vio_SL.mean(),
            "balance/load_max": load_LE.max(),
            "balance/load_min": load_LE.min(),
        }
        values |= {f"balance/max_vio_layer_{layer}": vio for layer, vio in enumerate(vio_SL.mean(0))}
        log_scalars(trainer, {name: float(value) for name, value in values.items()})
        if draw:
            bias_LE = torch.stack([router.expert_bias for router in routers_of(pl_module)])
            self.draw(trainer, load_LE, bias_LE)

    def draw(self, trainer: Trainer, load_LE: Tensor, bias_LE: Tensor) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                load = heat_map(load_LE.cpu(), "load, 1 = fair share", center=1.0)
                logger.experiment.add_figure("router/load", load, trainer.global_step)
                bias = heat_map(bias_LE.cpu(), "expert bias", center=0.0)
                logger.experiment.add_figure("router/bias", bias, trainer.global_step)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.val_max_vio = None

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        counts_LE = outputs["expert_counts"]
        if self.val_max_vio is None:
            self.val_max_vio = MaxVio(*counts_LE.shape).to(counts_LE.device)
        self.val_max_vio.update(counts_LE)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.val_max_vio is None or trainer.sanity_checking:
            return
        vio_L = torch.atleast_1d(self.val_max_vio.compute())  # torchmetrics makes one element a scalar
        self.max_vio_global = vio_L.tolist()
        values = {f"balance/max_vio_global_layer_{layer}": vio for layer, vio in enumerate(self.max_vio_global)}
        log_scalars(trainer, {"balance/max_vio_global": float(vio_L.mean()), **values})
