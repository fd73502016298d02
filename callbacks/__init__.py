"""The Lightning callbacks. Each works on its own, in any Lightning project whose routers have `expert_bias`.

The files are in `callbacks/` at the top of the repository and import as `dsv3_lightning.callbacks`. A class, and torch
with it, is imported on first use; `settings` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dsv3_lightning.callbacks.settings import CLASSES

if TYPE_CHECKING:
    from dsv3_lightning.callbacks.balance_factor import BalanceFactor
    from dsv3_lightning.callbacks.checkpoint import Checkpoint
    from dsv3_lightning.callbacks.expert_bias import ExpertBias
    from dsv3_lightning.callbacks.mtp_weight import MTPWeight
    from dsv3_lightning.callbacks.progress import Progress
    from dsv3_lightning.callbacks.router_monitor import RouterMonitor
    from dsv3_lightning.callbacks.router_probe import RouterProbe
    from dsv3_lightning.callbacks.run_report import RunReport
    from dsv3_lightning.callbacks.sample_text import SampleText
    from dsv3_lightning.callbacks.skewed_start import SkewedStart
    from dsv3_lightning.callbacks.throughput import Throughput
    from dsv3_lightning.callbacks.weight_average import WeightAverage

__all__ = [
    "BalanceFactor",
    "Checkpoint",
    "ExpertBias",
    "MTPWeight",
    "Progress",
    "RouterMonitor",
    "RouterProbe",
    "RunReport",
    "SampleText",
    "SkewedStart",
    "Throughput",
    "WeightAverage",
]
FILES = {class_name: name for name, class_name in CLASSES.items()}


def __getattr__(name: str) -> Any:
    if name not in FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{FILES[name]}"), name)
