"""Callbacks that runs of the tests name by class_path."""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer

from benchmarks.soak import memory_in_use


class Poison(Callback):
    """Fills the first gradient with inf on one rank, at a step (or from it on), in each of its micro-batches."""

    def __init__(self, rank: int, step: int, onwards: bool = False) -> None:
        self.rank, self.step, self.onwards = rank, step, onwards

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        now = trainer.global_step
        if trainer.global_rank == self.rank and (now >= self.step if self.onwards else now == self.step):
            next(p for p in pl_module.parameters() if p.grad is not None).grad.fill_(torch.inf)


class Sleepy(Callback):
    """Delays every n-th micro-batch before its forward pass, on one rank."""

    def __init__(self, rank: int, every: int, seconds: float) -> None:
        self.rank, self.every, self.seconds = rank, every, seconds

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == self.rank and (batch_idx + 1) % self.every == 0:
            time.sleep(self.seconds)


class Diary(Callback):
    """Writes one JSON line per optimizer step, and one per validation, into diary-<rank>.jsonl of the run's folder.

    memory_every: steps between measurements of the memory in use, 0 for none.
    """

    def __init__(self, memory_every: int = 0) -> None:
        self.memory_every = memory_every
        self.samples: list[int] = []

    def write(self, trainer: Trainer, **facts: Any) -> None:
        path = Path(trainer.default_root_dir) / f"diary-{trainer.global_rank}.jsonl"
        with open(path, "a") as file:
            file.write(json.dumps({"step": trainer.global_step, **facts}) + "\n")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.samples += batch["sample_ids"].tolist()
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            facts = {"samples": self.samples, "lr": pl_module.optimizers().param_groups[0]["lr"]}
            if self.memory_every and trainer.global_step % self.memory_every == 0:
                facts["rss"] = memory_in_use()
            self.write(trainer, **facts)
            self.samples = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        biases = [m.expert_bias.double().sum().item() for m in pl_module.modules() if hasattr(m, "expert_bias")]
        self.write(trainer, validation=True, biases=biases)


class Exit(Callback):
    """Ends the process in its first step."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        raise SystemExit("poisoned on purpose")


class Stop(Callback):
    """Sets trainer.should_stop in the first micro-batch of the named steps, on the last rank alone."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step + 1 in self.steps and trainer.global_rank == trainer.world_size - 1:
            trainer.should_stop = True


class StopAfterValidation(Callback):
    """Sets trainer.should_stop after each validation."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = True


class Ticks(Timer):
    """A Timer whose clock moves a second per optimizer step, as `time_elapsed` tells it."""

    ticks = 0

    def time_elapsed(self, stage: str = "train") -> float:
        return self._offset + self.ticks

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self.ticks += 1
        super().on_train_batch_end(trainer, *args, **kwargs)


class Raise(Callback):
    """Raises at the named moments, [step, hook] each, once each, whatever was restarted since.

    kill: raises KeyboardInterrupt, after which nothing is saved, but what was logged is on the disk.
    """

    def __init__(self, moments: list[list[Any]], kill: bool = True) -> None:
        self.moments, self.kill = moments, kill
        for hook in {hook for _, hook in moments}:
            setattr(self, hook, partial(self.look, hook))

    def look(self, hook: str, trainer: Trainer, *args: Any) -> None:
        marker = Path(trainer.default_root_dir) / f"{trainer.global_step}-{hook}"
        if [trainer.global_step, hook] in self.moments and not marker.exists():
            marker.touch()
            raise KeyboardInterrupt if self.kill else RuntimeError("raised on purpose")


class Spoil(Callback):
    """Makes the loss large in each step that holds a sample which was drawn in this step of the run's first life."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        path, own = Path(trainer.default_root_dir) / f"spoilt-{trainer.global_rank}.json", batch["sample_ids"].tolist()
        if trainer.global_step + 1 == self.step and not path.exists():
            path.write_text(json.dumps(own))
        if path.exists() and set(own) & set(json.loads(path.read_text())):
            with torch.no_grad():
                pl_module.model.lm_head.weight.mul_(50)
