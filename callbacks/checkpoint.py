"""Checkpoints: every N steps or minutes, whenever a run stops, and the best by validation loss."""

import math
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint as CheckpointBase
from lightning.pytorch.callbacks import EarlyStopping, Timer

from dsv3_lightning.callbacks.dashboard import RunLogger
from dsv3_lightning.callbacks.settings import CheckpointSettings
from dsv3_lightning.common.files import give_name, remove, whole
from dsv3_lightning.errors import RunStopped
from dsv3_lightning.parallel.checkpoints.names import BEST_FILE, LOSS, best_files, best_name, step_files
from dsv3_lightning.parallel.strategy import MeshStrategy
from dsv3_lightning.training.logging import (
    is_last_micro_batch,
    latest_values,
    logged_at,
    planned_steps,
    steps_done,
)

STOP = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
VALIDATION_LOSS = "val/loss"
ASKED = 1 << 16  # above every signal: a callback or a time limit has set trainer.should_stop
# A step of MANY micro-batches may take longer than the notice before a machine is preempted, so signals are also
# checked within such steps, after every ASK_EVERY micro-batches.
MANY, ASK_EVERY = 8, 4
RESUMES = "which is saved; the same command resumes from there"


class Checkpoint(CheckpointBase):
    """Writes step=<n>.ckpt into <default_root_dir>/checkpoints, and last.ckpt, a link to the newest.

    every_n_steps: optimizer steps between checkpoints. every_n_minutes: the same by the clock of the first rank, after
    the first step that ends so long after the last checkpoint began. Either may be None, and both may be set.
    keep: number of newest checkpoints to keep. keep_best: number of checkpoints with the lowest validation loss to
    keep, as best-step=<n>-loss=<x>.ckpt, or by another scalar `best_by` that is best when `best_is` lowest or highest,
    as best-step=<n>-highest=<x>.ckpt, whenever it is logged; a missing or non-finite value never counts. Where
    step=<n>.ckpt is there already, the best one is a second name of it. With strategy.sharded_checkpoints a checkpoint
    is a folder.

    The folder is the only record of its checkpoints, so a run killed at any moment leaves no state that disagrees.
    Every stop writes a checkpoint and prints one line with the reason: after the last step; after the current step or
    validation on the first Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP (on any rank), or, if a step has 8 micro-batches or more,
    within the next 4, with the last completed step; after the current step when
    `trainer.max_time` or anything else sets `trainer.should_stop`; and, in a run of one process, on an exception, with
    the last completed step. A second Ctrl-C ends the run at once.
    A time limit applies to one start of the command.
    Lightning runs checkpoint callbacks last, so the file includes what other callbacks change after a step.
    """

    def __init__(
        self,
        every_n_steps: int | None = 100,
        every_n_minutes: float | None = None,
        keep: int = 2,
        keep_best: int = 1,
        best_by: str = VALIDATION_LOSS,
        best_is: Literal["lowest", "highest"] = "lowest",
    ) -> None:
        CheckpointSettings(
            every_n_steps=every_n_steps,
            every_n_minutes=every_n_minutes,
            keep=keep,
            keep_best=keep_best,
            best_by=best_by,
            best_is=best_is,
        )
        self.every_n_steps, self.every_n_minutes = every_n_steps, every_n_minutes
        self.keep, self.keep_best, self.best_by = keep, keep_best, best_by
        self.best_kind = LOSS if (best_by, best_is) == (VALIDATION_LOSS, "lowest") else best_is
        self.clock = time.monotonic
        self.begun = self.clock()  # the newest checkpoint, or training
        self.saved: int | None = None  # the step of the newest checkpoint that this process has taken part in
        self.received = 0  # the signal that requested the stop
        self.asked = False  # a stop was requested in the middle of a step, which is finished first
        self.stopped_at: int | None = None  # the step after which the run stops, already saved
        self.done: int | None = None  # the last step that all callbacks have completed, if it can be saved
        self.step_done = StepDone(self)
        self.handlers: dict[int, Any] = {}
        self.terminals: list[int] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begun = self.clock()
        self.terminals = [handle for handle in (1, 2) if os.isatty(handle)]
        for number in STOP:
            ignored = number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN
            if not ignored:  # as nohup does
                self.handlers[number] = signal.signal(number, self.on_signal)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == getattr(signal, "SIGHUP", None):
            for handle in self.terminals:  # writing to a terminal that is gone would raise
                os.dup2(os.open(os.devnull, os.O_WRONLY), handle)
        self.received = number

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["curves"] = {
            name: size
            for logger in trainer.loggers
            if isinstance(logger, RunLogger)
            for name, size in logger.position().items()
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.rewind(checkpoint.get("curves", {}))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not is_last_micro_batch(trainer, batch_idx):
            if trainer.should_stop:
                self.asked, trainer.should_stop = True, False
            self.stop_within_step(trainer, batch_idx)
            return
        trainer.should_stop |= self.asked
        step, last = trainer.global_step, trainer.global_step >= planned_steps(trainer)
        stop, due = self.agreed(trainer)
        if stop or last or due or (self.every_n_steps is not None and step % self.every_n_steps == 0):
            self.done = None  # a save that fails isn't retried
            self.save(trainer)
        if logged_at(trainer, self.best_by) == step:
            self.done = None
            self.save_if_best(trainer)
        if stop or last:
            self.stopped_at = step
            self.settle(trainer)
        self.note_done(trainer)
        if not last:
            raise_if_signal(stop, step)

    def stop_within_step(self, trainer: Trainer, batch_idx: int) -> None:
        """When a signal has come, drops the micro-batches of the step and stops with the step before saved."""
        if not asks_within_step(batch_idx, trainer.accumulate_grad_batches):
            return
        wanted = torch.tensor(self.received, device=trainer.strategy.root_device)
        step, stop = trainer.global_step, int(trainer.strategy.reduce(wanted, reduce_op="max"))
        if not stop or step == 0:  # without a step to save, the first one is finished
            return
        if step not in (self.saved, getattr(trainer.lightning_module, "loaded_step", 0)):
            self.done = None
            for part in keepers(trainer):
                part.take_back()
            self.save(trainer)
        self.settle(trainer)
        raise_if_signal(stop, step)

    def agreed(self, trainer: Trainer) -> tuple[int, bool]:
        """The signal that stops the run now, ASKED for any other reason, or 0 to continue; and whether, by the first
        rank's clock, a checkpoint is due. The same on all ranks.
        """
        asked = trainer.should_stop and trainer.fit_loop._can_stop_early  # not before trainer.min_steps
        minutes = self.every_n_minutes if trainer.is_global_zero else None
        due = minutes is not None and self.clock() - self.begun >= 60 * minutes
        wanted = torch.tensor([ASKED if asked else self.received, int(due)], device=trainer.strategy.root_device)
        stop, due = trainer.strategy.reduce(wanted, reduce_op="max").tolist()
        trainer.should_stop |= stop == ASKED
        return stop, bool(due)

    def save(self, trainer: Trainer) -> None:
        self.begun = self.clock()
        self.write(trainer, f"step={trainer.global_step}.ckpt")
        self.saved = trainer.global_step
        self.tidy(trainer, trainer.global_step)

    def write(self, trainer: Trainer, name: str) -> None:
        for logger in trainer.loggers:
            logger.save()  # a resumed run needs every curve up to its first step
        trainer.save_checkpoint(checkpoint_folder(trainer) / name, weights_only=False)

    def settle(self, trainer: Trainer) -> None:
        """Waits until all background writes have finished."""
        if isinstance(trainer.strategy, MeshStrategy):
            trainer.strategy.finish_saving()
        self.tidy(trainer, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        if step and self.stopped_at != step:  # stopped by a validation
            self.save(trainer)
        self.settle(trainer)
        if trainer.should_stop and 0 < step < planned_steps(trainer) and trainer.is_global_zero:
            print(f"stopped by {who_stopped(trainer)} after step {step}, {RESUMES}", flush=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves the last completed step in a run of one process; with several, ranks may be at different steps."""
        if isinstance(exception, RunStopped | KeyboardInterrupt) or trainer.world_size > 1:
            return
        if self.done is not None and self.done == trainer.global_step and not getattr(pl_module, "updating", False):
            step, self.done = self.done, None
            for part in keepers(trainer):
                part.take_back()
            self.save(trainer)
            self.settle(trainer)
            print(f"stopped by {type(exception).__name__} after step {step}, {RESUMES}", flush=True)

    def note_done(self, trainer: Trainer) -> None:
        self.done = trainer.global_step
        if trainer.world_size == 1 or trainer.accumulate_grad_batches >= MANY:
            for part in keepers(trainer):
                part.keep()

    def tidy(self, trainer: Trainer, step: int) -> None:
        """Points last.ckpt to the newest complete checkpoint and removes those that are too old and not among the best.

        Checkpoints of later steps are damaged, or the run was resumed from an earlier one. They don't count and stay
        until this run reaches their step.
        """
        folder = checkpoint_folder(trainer)
        newest = step_files(folder, step)
        if not trainer.is_global_zero:
            return
        if newest:
            with whole(folder / "last.ckpt") as beside:
                beside.symlink_to(newest[0].name)
        for path in [*newest[self.keep :], *(path for _, path in best_files(folder, self.best_kind)[self.keep_best :])]:
            remove(path)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if logged_at(trainer, self.best_by) in (None, steps_done(trainer)):  # None: Lightning alone knows the value
            done, self.done = self.done, None
            self.save_if_best(trainer)
            self.done = done
        if trainer.state.fn == "fit" and trainer.global_step < planned_steps(trainer):
            stop, _ = self.agreed(trainer)
            if stop not in (0, ASKED):
                self.save(trainer)
                self.settle(trainer)
                raise_if_signal(stop, trainer.global_step)

    def save_if_best(self, trainer: Trainer) -> None:
        value = latest_values(trainer).get(self.best_by, math.nan)
        if not self.keep_best or not math.isfinite(value):
            return
        step, folder = steps_done(trainer), checkpoint_folder(trainer)
        best, path = best_files(folder, self.best_kind), folder / best_name(step, value, self.best_kind)
        worse = path in [file for _, file in best] or len(best) >= self.keep_best and not better(path, best[-1][1])
        if trainer.strategy.broadcast(worse):  # ranks may see the folder differently while a checkpoint is written
            return
        if trainer.state.fn == "fit" and self.saved == step:
            self.name_again(trainer, folder / f"step={step}.ckpt", path)
        elif trainer.state.fn == "fit":
            self.write(trainer, path.name)
        elif not hasattr(trainer.lightning_module, "loaded_step"):
            return  # the step of what is validated isn't known
        elif trainer.is_global_zero and not path.exists():  # the run was stopped between its last step and the report
            give_name(Path(str(trainer.ckpt_path)), path)
        self.tidy(trainer, step)

    def name_again(self, trainer: Trainer, path: Path, name: Path) -> None:
        """Gives the checkpoint of this step a second name, once it is written; the first rank does it for all."""
        if isinstance(trainer.strategy, MeshStrategy) and trainer.strategy.saver is not None:
            trainer.strategy.saver.name_again(path, name)
        elif trainer.is_global_zero:
            give_name(path, name)


def better(path: Path, other: Path) -> bool:
    """Whether the first of two best checkpoints of one kind has the better value, as rounded in their names."""
    matches = (BEST_FILE.fullmatch(one.name) for one in (path, other))
    first, second = (float(match[3]) for match in matches if match is not None)
    return first > second if "-highest=" in path.name else first < second


class StepDone(Callback):
    """Marks a step as completed, after the callbacks whose state is saved and before the user's, which may fail."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if is_last_micro_batch(trainer, batch_idx):
            self.checkpoint.note_done(trainer)


def asks_within_step(batch_idx: int, micro_batches: int) -> bool:
    """Whether the ranks check for a signal after this micro-batch, which they do within long steps.

    >>> [batch_idx for batch_idx in range(16) if asks_within_step(batch_idx, 8)]
    [3, 7, 11, 15]
    """
    return micro_batches >= MANY and (batch_idx + 1) % ASK_EVERY == 0


def keepers(trainer: Trainer) -> list[Any]:
    """The module and callbacks that change state in mid-step; `take_back` restores what `keep` has stored."""
    parts = [trainer.lightning_module, *trainer.callbacks]  # type: ignore[attr-defined]
    return [part for part in parts if hasattr(part, "keep") and hasattr(part, "take_back")]


def raise_if_signal(stop: int, step: int) -> None:
    if stop not in (0, ASKED):
        raise RunStopped(f"stopped by {signal.Signals(stop).name} after step {step}, {RESUMES}", code=128 + stop)


def who_stopped(trainer: Trainer) -> str:
    """A description of what set trainer.should_stop."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # the Trainer leaves it undeclared
        left = callback.time_remaining() if isinstance(callback, Timer) else None
        if left is not None and left <= 0:
            limit = timedelta(seconds=round(callback.time_elapsed() + left, 3))
            return f"the time limit of {limit} for one start (trainer.max_time or Timer)"
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message is not None:
            return f"EarlyStopping ({callback.stopping_reason_message.split(' Signaling')[0].rstrip('.')})"
    return "a callback that set trainer.should_stop"


def checkpoint_folder(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / "checkpoints"
