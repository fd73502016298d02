"""Nothing is lost: a checkpoint every N steps, at the end, when asked to stop, and the best by validation."""

import math
import os
import shutil
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint as CheckpointBase

from dsv3_lightning.callbacks.settings import CheckpointSettings
from dsv3_lightning.common.files import remove, whole
from dsv3_lightning.errors import RunStopped
from dsv3_lightning.parallel.checkpoints.names import best_files, step_files
from dsv3_lightning.parallel.strategy import MeshStrategy
from dsv3_lightning.training.logging import is_last_micro_batch, latest_scalars

STOP = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Checkpoint(CheckpointBase):
    """Writes step=<n>.ckpt into <default_root_dir>/checkpoints, and last.ckpt, a link to the newest.

    every_n_steps: optimizer steps between two. keep: how many of the newest stay. keep_best: how many stay of those
    with the lowest validation loss, as best-step=<n>-loss=<x>.ckpt. With
    strategy.sharded_checkpoints these are folders.

    The folder itself is the record of what there is: a run that is killed at any moment has no state that disagrees.
    The first Ctrl-C, SIGTERM or SIGUSR1 (on any rank) ends the run after the current step, with a checkpoint; a second
    Ctrl-C ends it at once. Lightning runs checkpoint callbacks last, so what others change after a step is in the file.
    """

    def __init__(self, every_n_steps: int = 100, keep: int = 2, keep_best: int = 1) -> None:
        CheckpointSettings(every_n_steps=every_n_steps, keep=keep, keep_best=keep_best)
        self.every_n_steps, self.keep, self.keep_best = every_n_steps, keep, keep_best
        self.received = 0  # the signal that asks to stop
        self.handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.handlers = {number: signal.signal(number, self.on_signal) for number in STOP}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not is_last_micro_batch(trainer, batch_idx):
            return
        step = trainer.global_step
        received = torch.tensor(self.received, device=trainer.strategy.root_device)
        stop = int(trainer.strategy.reduce(received, reduce_op="max"))  # all ranks stop at the same step
        if stop or step % self.every_n_steps == 0 or step == trainer.max_steps:
            self.save(trainer)
        if stop or step == trainer.max_steps:
            self.settle(trainer)
        if stop and step < trainer.max_steps:
            raise RunStopped(
                f"stopped by {signal.Signals(stop).name} after step {step}, which is saved; "
                "the same command goes on from there",
                code=128 + stop,
            )

    def save(self, trainer: Trainer) -> None:
        folder = checkpoint_folder(trainer)
        for logger in trainer.loggers:
            logger.save()  # a resumed run must find every curve up to the step that it resumes from
        trainer.save_checkpoint(folder / f"step={trainer.global_step}.ckpt", weights_only=False)
        self.tidy(trainer, trainer.global_step)

    def settle(self, trainer: Trainer) -> None:
        """Waits for what is written in the background, so that nothing is left to do."""
        if isinstance(trainer.strategy, MeshStrategy):
            trainer.strategy.finish_saving()
        self.tidy(trainer, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.settle(trainer)

    def tidy(self, trainer: Trainer, step: int) -> None:
        """Points last.ckpt to the newest that is wholly there, and removes what is too old or not among the best.

        Those of later steps are damaged, or the run was told to go on from an earlier one: they don't count, and stay
        until this run has come as far.
        """
        folder = checkpoint_folder(trainer)
        newest = step_files(folder, step)
        if trainer.is_global_zero and newest:
            with whole(folder / "last.ckpt") as beside:
                beside.symlink_to(newest[0].name)
            for path in [*newest[self.keep :], *(path for _, path in best_files(folder)[self.keep_best :])]:
                remove(path)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not self.keep_best:
            return
        late = trainer.state.fn == "validate"  # of a run that was stopped between its last step and its report
        step = trainer.max_steps if late else trainer.global_step
        value = latest_scalars(trainer).get("val/loss")
        if value is None or not math.isfinite(value):  # no target was validated, or the model is broken: not a best one
            return
        folder, loss = checkpoint_folder(trainer), f"{value:.4f}"
        best, path = best_files(folder), folder / f"best-step={step}-loss={loss}.ckpt"
        if len(best) >= self.keep_best and float(loss) >= best[-1][0]:  # as it is written there
            return
        if not late:
            trainer.save_checkpoint(path, weights_only=False)
        elif trainer.is_global_zero and not path.exists():
            link(Path(str(trainer.ckpt_path)), path)
        self.tidy(trainer, step)


def link(path: Path, name: Path) -> None:
    """A second name for a checkpoint, that stays when the first is removed."""
    with whole(name) as beside:
        if path.is_dir():
            shutil.copytree(path, beside, copy_function=os.link)
        else:
            os.link(path, beside)


def checkpoint_folder(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / "checkpoints"
