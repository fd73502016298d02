"""The Lightning callbacks. Each works on its own, in any Lightning project whose routers have `expert_bias`.

The files are in `callbacks/` at the top of the repository and import as `dsv3_lightning.callbacks`.
"""

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
