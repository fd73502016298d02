"""The load of the experts: MaxVio, percentiles, dead experts, bias; as scalars, histograms and layer × expert maps."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from dsv3_lightning.callbacks.charts import Charts
from dsv3_lightning.callbacks.protocol import all_biases, expert_counts, lookup, require_routers, routers_of
from dsv3_lightning.callbacks.settings import RouterMonitorSettings
from dsv3_lightning.common.plots import heat_map
from dsv3_lightning.parallel.data_ranks import has_first_samples, pipeline_of, sum_over_data
from dsv3_lightning.parallel.tensors import global_norm
from dsv3_lightning.training.logging import is_last_micro_batch, is_log_step, log_scalars, steps_done
from dsv3_lightning.training.metrics import MaxVio, max_vio
from dsv3_lightning.training.router_metrics import load_statistics, relative_load


class RouterMonitor(Callback):
    """Logs how evenly the experts are loaded, from outputs["expert_counts"], int64 [L, E], of training and validation.

    Scalars are means over layers and over the steps since the last log, with one all-reduce for all of them:
    balance/max_vio of the global batch, balance/max_vio_micro of a single micro-batch (in a pipeline: of a rank's
    batch), and balance/max_vio_worst of the worst layer, which a mean over sixty layers would hide; for the summed load
    of those steps balance/load_max, load_p95, load_p50, load_p5, load_min, load_cv, load_entropy, dead_experts and
    group_load_max (`load_statistics`);
    balance/bias_spread (largest minus smallest bias) and balance/bias_mean, which drifts if steps aren't centered;
    balance/router_grad_norm, before clipping.
    After a validation, balance/max_vio_global, from counts over the whole set.
    per_layer: also max_vio_layer_<l> and max_vio_global_layer_<l>, MoE layers numbered from 0, MTP modules last.
    Every `every_n_steps`, maps and histograms of relative load and of the expert bias.
    The state is the steps since the last log, summed over ranks, and the MaxVio of the last 50 steps.
    """

    def __init__(self, every_n_steps: int = 100, per_layer: bool = False) -> None:
        RouterMonitorSettings(every_n_steps=every_n_steps, per_layer=per_layer)
        self.every_n_steps, self.per_layer = every_n_steps, per_layer
        self.step_counts: Tensor | int = 0
        self.window: list[Tensor] = []  # [L, E] of each step since the last log
        self.micro_vio: Tensor | float = 0.0
        self.micro_batches = 0
        self.grad_norm: Tensor | None = None
        self.recent: list[float] = []  # batch-wise MaxVio of the last 50 steps, for the report
        self.val_max_vio: MaxVio | None = None
        self.max_vio_global: list[float] | None = None
        self.strategy: Any = None
        self.kept: tuple[list[Tensor], Tensor | float, int] = [], 0.0, 0

    @staticmethod
    def charts(tree: dict[str, Any], origins: int) -> Charts:
        per_layer = tree["callbacks"]["router_monitor"].get("per_layer", False)
        loads = ("load_max", "load_p95", "load_p50", "load_p5$", "load_min")
        return {
            "max_vio": ["balance/max_vio$", "balance/max_vio_micro$"],
            "max_vio_global": ["balance/max_vio_global$"],
            "max_vio_worst": ["balance/max_vio_worst$"],
            "load": [f"balance/{load}" for load in loads],
            "dead_experts": ["balance/dead_experts"],
            "unevenness": ["balance/load_cv", "balance/load_entropy"],
            "bias": ["balance/bias_spread", "balance/bias_mean"],
            "groups": ["balance/group_load_max"],
            "layers_max_vio": [r"balance/max_vio_layer_\d+"] if per_layer else [],
            "layers_max_vio_global": [r"balance/max_vio_global_layer_\d+"] if per_layer else [],
            "grad_norm": ["balance/router_grad_norm"],
        }

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.strategy = trainer.strategy

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        require_routers(trainer, pl_module, self)

    def state_dict(self) -> dict[str, Any]:
        """The state, summed over ranks; every rank must call this."""
        return {"window": self.summed_window() if self.window else None, "recent": self.recent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the sums on the first rank and zeros on the others, so the number of ranks may have changed."""
        self.recent = state_dict["recent"]
        if state_dict["window"] is None:
            return
        counts_by_step, micro_vio, micro_batches = state_dict["window"]
        if has_first_samples(self.strategy):
            self.window, self.micro_vio, self.micro_batches = list(counts_by_step), micro_vio, micro_batches
        else:
            self.window = list(torch.zeros_like(counts_by_step))

    def keep(self) -> None:
        self.kept = list(self.window), self.micro_vio, self.micro_batches

    def take_back(self) -> None:
        """Discards the micro-batches since `keep`."""
        self.window, self.micro_vio, self.micro_batches = self.kept

    def due(self, trainer: Trainer, step: int) -> bool:
        return step % self.every_n_steps == 0 or is_log_step(trainer, step)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self.due(trainer, trainer.global_step + 1):
            gradients = [lookup(router, "weight.grad") for router in routers_of(pl_module)]
            present = [gradient for gradient in gradients if gradient is not None]
            pipelined = pipeline_of(trainer.strategy) is not None
            if present or pipelined:
                self.grad_norm = global_norm(present, trainer.strategy.root_device if pipelined else None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        counts_LE = expert_counts(outputs, self, pl_module)
        self.step_counts = self.step_counts + counts_LE
        self.micro_vio = self.micro_vio + max_vio(counts_LE).mean()
        self.micro_batches += 1
        if not is_last_micro_batch(trainer, batch_idx):
            return
        assert isinstance(self.step_counts, Tensor)
        self.window.append(self.step_counts)
        self.step_counts = 0
        if not self.due(trainer, trainer.global_step):
            return
        counts_by_step, micro_vio, micro_batches = self.summed_window()
        self.window.clear()
        vio_by_step, counts_LE = max_vio(counts_by_step), counts_by_step.sum(0)
        bias_LE = all_biases(trainer, pl_module)
        groups = lookup(pl_module, "model.config.n_group", 1)
        values = {
            "max_vio": vio_by_step.mean(),
            "max_vio_micro": micro_vio / micro_batches,
            "max_vio_worst": vio_by_step.mean(0).amax(),
            "bias_spread": (bias_LE.amax(1) - bias_LE.amin(1)).mean(),
            "bias_mean": bias_LE.mean(),
            **{name: value_L.mean() for name, value_L in load_statistics(counts_LE, groups).items()},
        }
        if self.grad_norm is not None:
            values["router_grad_norm"] = self.grad_norm
        if self.per_layer:
            values |= {f"max_vio_layer_{layer}": vio for layer, vio in enumerate(vio_by_step.mean(0))}
        numbers = torch.stack([torch.as_tensor(value).double() for value in values.values()]).tolist()
        log_scalars(trainer, {f"balance/{name}": number for name, number in zip(values, numbers, strict=True)})
        self.recent = [*self.recent, *vio_by_step.mean(1).tolist()][-50:]
        self.micro_vio, self.micro_batches, self.grad_norm = 0.0, 0, None
        if trainer.global_step % self.every_n_steps == 0:
            draw(trainer, "router/load", relative_load(counts_LE).cpu(), "load, 1 = fair share", 1.0)
            draw(trainer, "router/bias", bias_LE.cpu(), "expert bias", 0.0)

    def summed_window(self) -> tuple[Tensor, float, int]:
        """Counts of the steps since the last log [S, L, E] int64, summed MaxVio of their micro-batches, and the number
        of micro-batches, over all ranks."""
        device = self.window[-1].device  # earlier ones may come from a checkpoint
        counts_by_step = torch.stack([counts_LE.to(device) for counts_LE in self.window])
        micro = torch.tensor([0.0, self.micro_batches], dtype=torch.float64, device=device)
        micro[0] += self.micro_vio
        packed = torch.cat([counts_by_step.flatten().double(), micro])  # counts are exact up to 2^53
        packed = sum_over_data(self.strategy, packed)
        return packed[:-2].long().view_as(counts_by_step), float(packed[-2]), int(packed[-1])

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
        if not isinstance(outputs, dict) or "expert_counts" not in outputs:
            return
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
        log_scalars(trainer, {"balance/max_vio_global": float(vio_L.mean()), **(values if self.per_layer else {})})


def draw(
    trainer: Trainer, tag: str, values: Tensor, title: str, center: float, rows: str | list[str] = "MoE layer"
) -> None:
    """Logs a map of rows × experts and a histogram of its values at this step."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            logger.experiment.add_figure(tag, heat_map(values, title, center, rows), steps_done(trainer))
            logger.experiment.add_histogram(f"{tag}_values", values.flatten(), steps_done(trainer))
