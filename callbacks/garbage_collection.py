"""Python's garbage collector, run at fixed steps."""

import gc

from lightning.pytorch import Callback, LightningModule, Trainer

from dsv3_lightning.callbacks.settings import GarbageCollectionSettings
from dsv3_lightning.training.logging import is_last_micro_batch


class GarbageCollection(Callback):
    """Collects garbage after every `every_n_steps` optimizer steps, on all ranks at the same step, and never between.

    Without it, each rank collects when its own number of objects reaches a threshold, and all others wait for that rank
    at the next collective. Objects from before the first step, which would take most of the time, are not searched.
    After training the collector works as before.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        GarbageCollectionSettings(every_n_steps=every_n_steps)
        self.every_n_steps = every_n_steps
        self.was_enabled: bool | None = None  # None outside of training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.was_enabled = gc.isenabled()
        gc.disable()
        gc.collect()
        gc.freeze()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if is_last_micro_batch(trainer, batch_idx) and trainer.global_step % self.every_n_steps == 0:
            gc.collect()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.was_enabled is not None:
            gc.unfreeze()
            if self.was_enabled:
                gc.enable()
            self.was_enabled = None
