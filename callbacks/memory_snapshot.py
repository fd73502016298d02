"""A snapshot of the GPU's memory when it has run out."""

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dsv3_lightning.callbacks.settings import MemorySnapshotSettings


class MemorySnapshot(Callback):
    """Writes out-of-memory-step=<n>-rank=<r>.pickle into `default_root_dir` when an allocation on CUDA fails.

    pytorch.org/memory_viz shows the file: every segment and block, and what lay between them.
    history: number of latest allocations and frees to record with their Python stacks, which takes about 1 KB and some
        microseconds for each; 0 records none, and costs nothing until memory runs out.
    """

    def __init__(self, history: int = 0) -> None:
        MemorySnapshotSettings(history=history)
        self.history = history

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.history and pl_module.device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=self.history, stacks="python")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not ran_out_of_memory(exception, pl_module.device):
            return
        path = Path(trainer.default_root_dir) / snapshot_name(trainer.global_step, trainer.global_rank)
        torch.cuda.memory._dump_snapshot(str(path))  # the tensors still live: the exception holds their frames
        print(f"rank {trainer.global_rank}: out of memory; a snapshot of it is in {path}", flush=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.history and pl_module.device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None)


def ran_out_of_memory(exception: BaseException, device: torch.device) -> bool:
    """Whether the exception, or one of its causes, was raised by CUDA's allocator."""
    step: BaseException | None = exception
    while step is not None:
        if isinstance(step, torch.OutOfMemoryError):
            return device.type == "cuda"
        step = step.__cause__ or step.__context__
    return False


def snapshot_name(step: int, rank: int) -> str:
    """
    >>> snapshot_name(1200, 13)
    'out-of-memory-step=1200-rank=13.pickle'
    """
    return f"out-of-memory-step={step}-rank={rank}.pickle"
