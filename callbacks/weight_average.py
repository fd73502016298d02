"""An exponential moving average of the weights, kept on the CPU (V3 §3.2.3) and validated along with the weights."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from dsv3_lightning.callbacks.charts import Charts
from dsv3_lightning.callbacks.protocol import from_batch, require_model
from dsv3_lightning.callbacks.settings import WeightAverageSettings
from dsv3_lightning.model.transformer import Losses
from dsv3_lightning.parallel.data_ranks import pipeline_of
from dsv3_lightning.parallel.strategy import MeshStrategy
from dsv3_lightning.parallel.tensors import as_dtensor_like, local, local_shard
from dsv3_lightning.parallel.weights import gather_all, own_copy, put, reshard
from dsv3_lightning.training.logging import is_last_micro_batch, log_scalars
from dsv3_lightning.training.metrics import TokenLoss


class WeightAverage(Callback):
    """Averages a = d · a + (1 - d) · w after every optimizer step not skipped, with d = min(decay, (1 + n) / (10 + n)).

    n is the number of updates, so that short runs aren't dominated by the initial weights. a is fp32 on the CPU; each
    rank has the shards of its weights. Expert biases aren't weights and aren't averaged.

    Needs `pl_module.model` with `losses`. After a validation, repeats its batches with the average in place of the
    weights. Logs val/loss_average. The state is n and the average, full or sharded like the checkpoint.
    """

    def __init__(self, decay: float) -> None:
        WeightAverageSettings(decay=decay)
        self.decay, self.updates = decay, 0
        self.weights: dict[str, nn.Parameter] = {}
        self.average: dict[str, Tensor] = {}  # this rank's shard of each weight
        self.loaded: dict[str, Tensor] | None = None
        self.to_save: Callable[[dict[str, Tensor]], dict[str, Tensor]] = gather_all

    @staticmethod
    def charts(tree: dict[str, Any], origins: int) -> Charts:
        return {"val_loss": ["val/loss_average"]}

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.weights, self.average = {}, {}
        self.to_save = trainer.strategy.to_save if isinstance(trainer.strategy, MeshStrategy) else gather_all

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        require_model(pl_module, self)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        require_model(pl_module, self)

    def adopt(self, pl_module: Any) -> None:
        """Initializes the average once from the weights or from a checkpoint."""
        if self.average:
            return
        reshard(pl_module.model)
        self.weights = dict(pl_module.model.named_parameters())
        if self.loaded is None:
            self.average = {name: own_copy(weight) for name, weight in self.weights.items()}
        else:
            self.average = {name: local_shard(self.loaded[name], weight).cpu() for name, weight in self.weights.items()}
            self.loaded = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.adopt(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not is_last_micro_batch(trainer, batch_idx) or getattr(pl_module, "step_skipped", False):
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, weight in self.weights.items():
            self.average[name].lerp_(own_copy(weight), 1 - decay)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        self.adopt(pl_module)
        loss = TokenLoss(1 + pl_module.model.config.mtp_depth).to(pl_module.device)
        trained = {name: local(weight.detach()).clone() for name, weight in self.weights.items()}
        put(pl_module.model, self.average)
        try:
            for batch in batches(trainer):
                inputs = [from_batch(batch, key, self) for key in ("tokens", "mask", "targets")]
                losses = self.losses_of(trainer, pl_module, batch, inputs)
                loss.update(losses.nll_P, batch["targets"])
        finally:
            put(pl_module.model, trained)
        log_scalars(trainer, {"val/loss_average": loss.compute()[0]})

    def losses_of(self, trainer: Trainer, pl_module: Any, batch: Any, inputs: list[Tensor]) -> Losses:
        strategy, pipeline = trainer.strategy, pipeline_of(trainer.strategy)
        if pipeline is not None:
            return pipeline.evaluate(batch, strategy.pipeline_micro_batches)  # type: ignore[attr-defined]
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            return pl_module.model.losses(*inputs, documents_BS=batch.get("documents"))

    def state_dict(self) -> dict[str, Any]:
        """The state, with shards gathered; every rank must call this."""
        average = {
            name: as_dtensor_like(weight, self.average[name].to(local(weight).device))
            for name, weight in self.weights.items()
        }
        return {"updates": self.updates, "average": self.to_save(average)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates, self.loaded = state_dict["updates"], state_dict["average"]
        self.average = {}


def batches(trainer: Trainer) -> Any:
    """Yields the batches of the validation that has just ended, on the device."""
    for number, batch in enumerate(trainer.val_dataloaders):  # type: ignore[arg-type]
        if number >= trainer.num_val_batches[0]:
            return
        yield trainer.strategy.batch_to_device(batch)
