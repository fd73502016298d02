"""Training speed and its share of the device's peak."""

import resource
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dsv3_lightning.callbacks.charts import Charts
from dsv3_lightning.callbacks.settings import ThroughputSettings
from dsv3_lightning.training.logging import is_last_micro_batch, is_log_step, log_scalars
from dsv3_lightning.training.precision import measure_gemm


class Throughput(Callback):
    """Logs tokens/s, model FLOP/s and MFU over the time spent in training, without validation, samples and checkpoints.

    peak_flops: FLOP/s of one device in this precision; None measures matrix products before the first step.

    Reads outputs["tokens"], the micro-batch's positions on this rank, and `pl_module.flops_per_token`, the training
    FLOP per position; the data wait is `wait_seconds` of the train loader, if it has that attribute.

    Logs throughput/tokens_per_second, throughput/model_flops_per_second (all ranks together), throughput/mfu (share of
    peak · ranks), throughput/data_wait_share (share of the time spent waiting for batches) and
    throughput/memory_bytes (peak of this process; its device memory on CUDA).
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        ThroughputSettings(peak_flops=peak_flops)
        self.peak_flops, self.measure = peak_flops, peak_flops is None
        self.flops_per_token = 0.0
        self.window = Window()
        self.total = Window()
        self.batch_start = 0.0
        self.waited_before = 0.0

    @staticmethod
    def charts(tree: dict[str, Any], origins: int) -> Charts:
        return {
            "tokens": ["throughput/tokens_per_second"],
            "flops": ["throughput/model_flops_per_second"],
            "mfu": ["throughput/mfu"],
            "data_wait": ["throughput/data_wait_share"],
            "memory": ["throughput/memory_bytes"],
        }

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.flops_per_token = pl_module.flops_per_token
        if self.measure:
            dtype = torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float32
            self.peak_flops = measure_gemm(dtype, pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batch_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        waited = getattr(trainer.train_dataloader, "wait_seconds", 0.0)
        elapsed = time.perf_counter() - self.batch_start
        tokens = outputs["tokens"] * trainer.world_size
        for window in (self.window, self.total):
            window.add(tokens, elapsed, waited - self.waited_before)
        self.waited_before = waited
        if is_last_micro_batch(trainer, batch_idx) and is_log_step(trainer, trainer.global_step):
            rates = self.rates(self.window, trainer.world_size)
            log_scalars(trainer, {f"throughput/{name}": value for name, value in rates.items()})
            self.window = Window()

    def rates(self, window: "Window", world_size: int) -> dict[str, float | None]:
        """Rates keyed by logged name without its group; None if no time has passed."""
        rates: dict[str, float | None] = {"memory_bytes": float(peak_memory())}
        if not window.seconds:
            return rates | dict.fromkeys(("tokens_per_second", "model_flops_per_second", "mfu", "data_wait_share"))
        assert self.peak_flops is not None, "set when training starts"
        flops = window.tokens / window.seconds * self.flops_per_token
        return rates | {
            "tokens_per_second": window.tokens / window.seconds,
            "model_flops_per_second": flops,
            "mfu": flops / (self.peak_flops * world_size),
            "data_wait_share": window.waited / window.seconds,
        }


class Window:
    """Tokens of all ranks, total seconds and seconds spent waiting for data, over several micro-batches."""

    def __init__(self) -> None:
        self.tokens, self.seconds, self.waited = 0, 0.0, 0.0

    def add(self, tokens: int, computed: float, waited: float) -> None:
        self.tokens += tokens
        self.seconds += computed + waited
        self.waited += waited


def peak_memory() -> int:
    """Peak memory in bytes: device memory on CUDA, else the resident set of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
