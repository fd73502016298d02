"""The Lightning callbacks. Each works on its own, in any Lightning project whose routers have `expert_bias`.

The files are in `callbacks/` at the top of the repository and import as `dsv3_lightning.callbacks`. A class, and torch
with it, is imported on first use; `settings` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dsv3_lightning.callbacks.settings import CLASSES

if TYPE_CHECKING:
    from dsv3_lightning.callbacks.balance_factor import BalanceFactor as BalanceFactor
    from dsv3_lightning.callbacks.checkpoint import Checkpoint as Checkpoint
    from dsv3_lightning.callbacks.evaluate import Evaluate as Evaluate
    from dsv3_lightning.callbacks.expert_bias import ExpertBias as ExpertBias
    from dsv3_lightning.callbacks.garbage_collection import GarbageCollection as GarbageCollection
    from dsv3_lightning.callbacks.loss_spike import LossSpike as LossSpike
    from dsv3_lightning.callbacks.memory_snapshot import MemorySnapshot as MemorySnapshot
    from dsv3_lightning.callbacks.mtp_weight import MTPWeight as MTPWeight
    from dsv3_lightning.callbacks.pipeline_trace import PipelineTrace as PipelineTrace
    from dsv3_lightning.callbacks.progress import Progress as Progress
    from dsv3_lightning.callbacks.router_monitor import RouterMonitor as RouterMonitor
    from dsv3_lightning.callbacks.router_probe import RouterProbe as RouterProbe
    from dsv3_lightning.callbacks.run_report import RunReport as RunReport
    from dsv3_lightning.callbacks.sample_text import SampleText as SampleText
    from dsv3_lightning.callbacks.skewed_start import SkewedStart as SkewedStart
    from dsv3_lightning.callbacks.throughput import Throughput as Throughput
    from dsv3_lightning.callbacks.weight_average import WeightAverage as WeightAverage

__all__ = sorted(CLASSES.values())
FILES = {class_name: name for name, class_name in CLASSES.items()}


def __getattr__(name: str) -> Any:
    if name not in FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{FILES[name]}"), name)
