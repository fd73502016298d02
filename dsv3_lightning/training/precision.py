"""Precision by name. `auto` measures matrix products, since bf16 speeds of CPUs differ by a factor of hundreds."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.types import Steppable
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.tensor import DTensor

PRECISIONS = ("auto", "32", "bf16-mixed", "bf16")


def choose_precision(name: str, device: torch.device) -> tuple[str, str]:
    """The precision, and a line with the reason. `auto` chooses bf16-mixed if its matrix products are faster."""
    if name != "auto":
        return name, f"precision {name}, as set"
    full, half = measure_gemm(torch.float32, device), measure_gemm(torch.bfloat16, device)
    chosen = "bf16-mixed" if half > 1.2 * full else "32"  # below that, casts cost more than they save
    rates = f"matrix products: fp32 {full / 1e9:.0f}, bf16 {half / 1e9:.1f} GFLOP/s"
    return chosen, f"precision {chosen}, chosen by measurement ({rates})"


def product_dtype(name: str) -> torch.dtype:
    """The type of matrix products in a precision, which isn't auto."""
    return torch.float32 if name == "32" else torch.bfloat16


def precision_plugin(name: str, device: torch.device) -> Precision:
    """Lightning's plugin for `32` and `bf16-mixed`, ours for `bf16`."""
    if name == "bf16":
        return BF16Weights()
    return MixedPrecision("bf16-mixed", device.type) if name == "bf16-mixed" else Precision()


class BF16Weights(Precision):
    """Matrices in bf16 with fp32 master copies in MasterAdamW; router, norms, expert bias and metrics stay fp32.

    Gradients are computed in bf16 and accumulated over micro-batches and ranks in fp32 (V3 §3.3.2). Sharded weights
    stay fp32 and FSDP2 gathers them in bf16, so a rank's shards need no master copies.
    Lightning's bf16-true would also cast the expert bias, and lose updates of 0.001 at a bias of 0.5.
    """

    precision = "bf16-true"

    def convert_module(self, module: nn.Module) -> nn.Module:
        for child in module.modules():
            if not hasattr(child, "expert_bias"):
                for parameter in child.parameters(recurse=False):
                    if parameter.dim() >= 2 and not isinstance(parameter, DTensor):
                        round_weight(parameter)
        return module

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Steppable, model: pl.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Turns off DDP's bf16 all-reduce; gradients are averaged in fp32 after the step's last backward pass."""
        strategy = model.trainer.strategy

        def last_micro_batch() -> Any:
            with strategy.block_backward_sync():  # type: ignore[attr-defined]
                result = closure()
            average(model.parameters())
            return result

        distributed = isinstance(strategy, DDPStrategy)
        return super().optimizer_step(optimizer, model, last_micro_batch if distributed else closure, **kwargs)


def round_weight(parameter: nn.Parameter) -> None:
    """Rounds a weight to bf16. Its gradient is fp32; `master` holds the unrounded weight for the optimizer's copy."""
    if parameter.dtype != torch.bfloat16:  # it is already when a run's module is set up again for validation
        parameter.master = parameter.data  # type: ignore[attr-defined]
        parameter.data = parameter.data.bfloat16()
        parameter.grad_dtype = torch.float32


def average(parameters: Iterable[nn.Parameter]) -> None:
    """Averages gradients over all ranks."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    torch._foreach_div_(gradients, dist.get_world_size())
    for under_way in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
        under_way.wait()


def measure_gemm(dtype: torch.dtype, device: torch.device, seconds: float = 0.1) -> float:
    """FLOP/s of square matrix products: the best of several sizes, each tried for about `seconds`.

    Sizes grow while a product is cheap, so a CPU with 0.8 GFLOP/s in bf16 takes no longer than others.
    """
    best, size, elapsed = 0.0, 128, 0.0
    while elapsed < seconds / 4 and size <= 8192:
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        a @ b  # warm-up
        start, runs = now(device), 0
        while (elapsed := now(device) - start) < seconds / 4 or runs < 2:
            for _ in range(1 if size >= 512 else 8):
                a @ b
                runs += 1
            if device.type != "cpu":
                torch.accelerator.synchronize()
        best = max(best, 2 * size**3 * runs / elapsed)
        elapsed /= runs
        size *= 2
    return best


def now(device: torch.device) -> float:
    """The time in seconds, once everything queued on the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()
