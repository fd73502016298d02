"""The return of a run to an earlier checkpoint, in the process that was training."""

import gc
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from dsv3_lightning.callbacks.loss_spike import RETURNS, LossSpiked, read_returns, returns_text
from dsv3_lightning.common.files import write_file
from dsv3_lightning.data.batches.module import TextDataModule
from dsv3_lightning.data.batches.skips import skip_between
from dsv3_lightning.runs.record import set_aside


def record_return(folder: Path, trainer: Trainer, data: TextDataModule, spiked: LossSpiked) -> None:
    """Sets later checkpoints aside, then writes what the run leaves out; all ranks wait for the first one.

    A run that is killed between the two meets the same samples and the same spike again.
    """
    trainer.strategy.barrier()  # every rank has written its part of a checkpoint
    if trainer.is_global_zero:
        set_aside(folder, spiked.back_to)
        skips = skip_between(data.skips, data.position(spiked.back_to), data.position(spiked.step))
        record = {"step": spiked.step, "loss": spiked.loss, "back_to": spiked.back_to, "skips": skips}
        write_file(folder / RETURNS, returns_text([*read_returns(folder), record]))
        print(f"{spiked}, and on without the samples since (return {len(read_returns(folder))})", flush=True)
    trainer.strategy.barrier()


def free_memory() -> None:
    """Frees the old model and optimizer, which refer to each other, before the new ones are made."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
