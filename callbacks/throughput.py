"""Training speed, its share of the device's peak, and the slowest of the ranks."""

import resource
import socket
import sys
import time
from statistics import median_low
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from dsv3_lightning.callbacks.charts import Charts
from dsv3_lightning.callbacks.protocol import lookup, output
from dsv3_lightning.callbacks.rank_times import (
    OwnWork,
    RankTimes,
    by_stage,
    first_straggler,
    highest,
    max_over_mean,
    step_seconds,
)
from dsv3_lightning.callbacks.settings import ThroughputSettings
from dsv3_lightning.parallel.data_ranks import data_ranks
from dsv3_lightning.planning.hardware import gpu_of_device
from dsv3_lightning.training.logging import is_last_micro_batch, is_log_step, log_scalars
from dsv3_lightning.training.precision import measure_gemm

NAME_BYTES = 64  # of a host's name


class Throughput(Callback):
    """Logs tokens/s, model FLOP/s and MFU over the time spent in training, without validation, samples and checkpoints,
    and compares the ranks.

    peak_flops: FLOP/s of one device in this precision. None takes the data sheet's for a known GPU, and otherwise
    measures matrix products before the first step.
    straggler: prints a line at a logged step in which the slowest rank would need this many times the median rank's
    time, and at least 0.1 s more.

    Reads outputs["tokens"], the micro-batch's positions on this rank, and `pl_module.flops_per_token`, the training
    FLOP per position; the data wait is `wait_seconds` of the train loader. Without one of these two attributes, the
    scalars that depend on it are not logged, and the peak is not measured without `flops_per_token`. The time of
    callbacks before a forward pass counts if the module has `forward_start`.

    Logs throughput/tokens_per_second, throughput/model_flops_per_second (all ranks together), throughput/mfu (share of
    peak · ranks), throughput/mfu_of_measured_peak where the peak is a data sheet's, and throughput/data_wait_share
    (share of the time spent waiting for batches, on this rank). Of all ranks, exchanged in one all-gather per logged
    step: throughput/step_seconds_min, _median and _max (see `rank_times.step_seconds`), throughput/slowest_rank,
    throughput/data_wait_seconds_max (per step), throughput/memory_bytes and throughput/memory_reserved_bytes (peaks,
    largest of any rank; the process's memory on a CPU), throughput/allocation_retries (sum over ranks) and
    throughput/slots_max_over_mean (routed tokens received by a rank's experts).
    """

    def __init__(self, peak_flops: float | None = None, straggler: float = 1.5) -> None:
        ThroughputSettings(peak_flops=peak_flops, straggler=straggler)
        self.peak_flops, self.measure, self.straggler = peak_flops, peak_flops is None, straggler
        self.measured_peak: float | None = None
        self.flops_per_token: float | None = None
        self.waits_known = False
        self.window = Window()
        self.total = Window()
        self.batch_start = 0.0
        self.waited_before = 0.0
        self.own: OwnWork | None = None  # open during the last micro-batch of a step that is logged
        self.hosts: list[str] = []

    @staticmethod
    def charts(tree: dict[str, Any], origins: int) -> Charts:
        model = tree["model"]
        sparse = model["num_hidden_layers"] - model["first_k_dense_replace"] + model["num_nextn_predict_layers"]
        return {
            "tokens": ["throughput/tokens_per_second"],
            "flops": ["throughput/model_flops_per_second"],
            "mfu": ["throughput/mfu"],
            "data_wait": ["throughput/data_wait_share"],
            "data_wait_max": ["throughput/data_wait_seconds_max"],
            "step_seconds": ["throughput/step_seconds_(min|median|max)"],
            "slowest_rank": ["throughput/slowest_rank"],
            "slots": ["throughput/slots_max_over_mean"] if sparse and model["n_routed_experts"] else [],
            "memory": [r"throughput/memory_\w*bytes"],
            "retries": ["throughput/allocation_retries"],
        }

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.flops_per_token = lookup(pl_module, "flops_per_token")
        self.waits_known = hasattr(trainer.train_dataloader, "wait_seconds")
        self.hosts = [name_from(row) for row in gathered(trainer, name_bytes(socket.gethostname()))]
        if self.measure and self.flops_per_token is not None:
            dtype = torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float32
            self.measured_peak = measure_gemm(dtype, pl_module.device)
            self.peak_flops = data_sheet_peak(pl_module.device, dtype) or self.measured_peak

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if is_last_micro_batch(trainer, batch_idx) and is_log_step(trainer, trainer.global_step + 1):
            self.own = OwnWork(pl_module, pl_module.device)
        self.batch_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        waited = getattr(trainer.train_dataloader, "wait_seconds", 0.0)
        elapsed = time.perf_counter() - self.batch_start
        tokens = int(output(outputs, "tokens", self, pl_module)) * data_ranks(trainer.strategy)
        for window in (self.window, self.total):
            window.add(tokens, elapsed, waited - self.waited_before)
        self.waited_before = waited
        if is_last_micro_batch(trainer, batch_idx) and is_log_step(trainer, trainer.global_step):
            rates = self.rates(self.window, trainer.world_size) | self.compare_ranks(trainer, pl_module)
            log_scalars(trainer, {f"throughput/{name}": value for name, value in rates.items()})
            self.window = Window()

    def rates(self, window: "Window", world_size: int) -> dict[str, float | None]:
        """Rates keyed by logged name without its group; None if no time has passed."""
        names = ("tokens_per_second", "model_flops_per_second", "mfu", "mfu_of_measured_peak", "data_wait_share")
        rates: dict[str, float | None] = dict.fromkeys(names)
        if not window.seconds:
            return rates
        rates["tokens_per_second"] = window.tokens / window.seconds
        rates["data_wait_share"] = window.waited / window.seconds if self.waits_known else None
        if self.flops_per_token is None:
            return rates
        assert self.peak_flops is not None, "set when training starts"
        flops = window.tokens / window.seconds * self.flops_per_token
        rates |= {"model_flops_per_second": flops, "mfu": flops / (self.peak_flops * world_size)}
        if self.measured_peak is not None and self.measured_peak != self.peak_flops:
            rates["mfu_of_measured_peak"] = flops / (self.measured_peak * world_size)
        return rates

    def compare_ranks(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float | None]:
        """The scalars of all ranks, keyed as in `rates`; all ranks must call it. Prints a line about a straggler."""
        ranks = [RankTimes(*row.tolist()) for row in gathered(trainer, self.own_times(pl_module))]
        stages = by_stage(ranks, data_ranks(trainer.strategy))
        found = [step_seconds(stage, trainer.accumulate_grad_batches) for stage in stages]
        late, seconds = first_straggler(found, self.straggler), [value for stage in found for value in stage]
        if late is not None and trainer.is_global_zero:
            print(
                f"step {trainer.global_step}: rank {late} ({self.hosts[late]}) is slow: by itself it needs "
                f"{seconds[late]:.3g} s for a step, the median rank {median_low(seconds):.3g} s",
                flush=True,
            )
        return {
            "step_seconds_min": min(seconds),
            "step_seconds_median": median_low(seconds),
            "step_seconds_max": max(seconds),
            "slowest_rank": seconds.index(max(seconds)),
            "data_wait_seconds_max": max(rank.waited for rank in ranks) * trainer.accumulate_grad_batches,
            "memory_bytes": max(rank.allocated for rank in ranks),
            "memory_reserved_bytes": max(rank.reserved for rank in ranks),
            "allocation_retries": sum(rank.retries for rank in ranks),
            "slots_max_over_mean": highest(max_over_mean([rank.slots for rank in stage]) for stage in stages),
        }

    def own_times(self, pl_module: LightningModule) -> Tensor:
        """This rank's `RankTimes` as a tensor, fp64 [8]."""
        own, self.own = self.own, None
        reached = lookup(pl_module, "forward_start", self.batch_start)
        window, batches = self.window, max(1, self.window.batches)
        times = RankTimes(
            seconds=window.seconds / batches,
            waited=window.waited / batches,
            host=max(0.0, reached - self.batch_start),
            compute=own.close() if own else 0.0,
            allocated=peak_memory(),
            reserved=torch.cuda.max_memory_reserved() if torch.cuda.is_available() else peak_memory(),
            retries=torch.cuda.memory_stats().get("num_alloc_retries", 0) if torch.cuda.is_available() else 0,
            slots=own.slots if own else 0,
        )
        return torch.tensor(times, dtype=torch.float64)


class Window:
    """Tokens of all ranks, total seconds and seconds spent waiting for data, over several micro-batches."""

    def __init__(self) -> None:
        self.tokens, self.seconds, self.waited, self.batches = 0, 0.0, 0.0, 0

    def add(self, tokens: int, computed: float, waited: float) -> None:
        self.tokens += tokens
        self.seconds += computed + waited
        self.waited += waited
        self.batches += 1


def gathered(trainer: Trainer, values: Tensor) -> Tensor:
    """The values [n] of each rank, [ranks, n]; all ranks must call it."""
    if trainer.world_size == 1:
        return values[None]
    own = values.to(trainer.strategy.root_device)
    found = own.new_empty(trainer.world_size, len(own))
    dist.all_gather([*found], own)
    return found.cpu()


def name_bytes(name: str) -> Tensor:
    return torch.tensor(list(name.encode()[:NAME_BYTES].ljust(NAME_BYTES, b"\0")), dtype=torch.uint8)


def name_from(row: Tensor) -> str:
    return bytes(row.tolist()).rstrip(b"\0").decode(errors="replace")


def data_sheet_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s by the device's data sheet; None for a CPU and for an unknown GPU."""
    gpu = gpu_of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if gpu is None else gpu.peak_in("32" if dtype == torch.float32 else "bf16")


def peak_memory() -> int:
    """Peak memory in bytes: device memory on CUDA, else the resident set of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
