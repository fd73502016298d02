"""The settings of each callback: names, types, defaults and ranges.

A callback's constructor has the same arguments and checks them by making its settings. Imports no torch, so that
mistakes are reported at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass
from typing import Any, Literal

from dsv3_lightning.common.paths import PathText
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.training.schedule import Schedule, check_schedule

PROMPTS = ("def ", "import os\n", "class Node:\n")


def at_least(least: int, key: str, value: float, note: str = "") -> None:
    if not value >= least:
        raise ConfigError(f"callbacks.{key}={value}: must be at least {least}{note}")


@dataclass(frozen=True, kw_only=True)
class ExpertBiasSettings:
    speed: float = 1e-3
    schedule: Schedule = ((0.0, 1.0), (0.966, 0.0))
    by: str = "share"
    rule: Literal["sign", "proportional"] = "sign"
    centered: bool = False

    def __post_init__(self) -> None:
        at_least(0, "expert_bias.speed", self.speed)
        check_schedule(self.schedule, self.by, "callbacks.expert_bias.schedule")


@dataclass(frozen=True, kw_only=True)
class BalanceFactorSettings:
    schedule: Schedule = ((0.0, 1.0),)
    by: str = "share"

    def __post_init__(self) -> None:
        check_schedule(self.schedule, self.by, "callbacks.balance_factor.schedule")


@dataclass(frozen=True, kw_only=True)
class SkewedStartSettings:
    strength: float

    def __post_init__(self) -> None:
        if not self.strength > 0:
            raise ConfigError(
                f"callbacks.skewed_start.strength={self.strength}: must be above 0; null for an even start"
            )


@dataclass(frozen=True, kw_only=True)
class MTPWeightSettings:
    schedule: Schedule = ((0.0, 0.3), (0.676, 0.1))
    by: str = "share"

    def __post_init__(self) -> None:
        check_schedule(self.schedule, self.by, "callbacks.mtp_weight.schedule")


@dataclass(frozen=True, kw_only=True)
class RouterMonitorSettings:
    every_n_steps: int = 100
    per_layer: bool = False

    def __post_init__(self) -> None:
        at_least(1, "router_monitor.every_n_steps", self.every_n_steps)


@dataclass(frozen=True, kw_only=True)
class WeightAverageSettings:
    decay: float

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigError(f"callbacks.weight_average.decay={self.decay}: must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class ThroughputSettings:
    peak_flops: float | None = None
    straggler: float = 1.5

    def __post_init__(self) -> None:
        if not self.straggler > 1:
            raise ConfigError(f"callbacks.throughput.straggler={self.straggler}: must be above 1")
        if self.peak_flops is not None and not self.peak_flops > 0:
            raise ConfigError(
                f"callbacks.throughput.peak_flops={self.peak_flops}: must be above 0, or null to measure it"
            )


@dataclass(frozen=True, kw_only=True)
class SampleTextSettings:
    every_n_steps: int = 200
    prompts: Sequence[str] = PROMPTS
    max_new_tokens: int = 64
    temperature: float = 0.7

    def __post_init__(self) -> None:
        at_least(1, "sample_text.every_n_steps", self.every_n_steps)
        at_least(1, "sample_text.max_new_tokens", self.max_new_tokens)
        at_least(0, "sample_text.temperature", self.temperature, " (0 is greedy)")
        if not self.prompts:
            raise ConfigError("callbacks.sample_text.prompts=[]: needs a prompt; sample_text=null switches samples off")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    tasks: Sequence[PathText]
    every_n_steps: int = 1000
    limit: int | None = 100

    def __post_init__(self) -> None:
        at_least(1, "evaluate.every_n_steps", self.every_n_steps)
        if self.limit is not None:
            at_least(1, "evaluate.limit", self.limit, ", or null for all")
        if not self.tasks:
            raise ConfigError("callbacks.evaluate.tasks=[]: needs a jsonl file; evaluate=null switches it off")


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    every_n_steps: int | None = 100
    every_n_minutes: float | None = None
    keep: int = 2
    keep_best: int = 1
    best_by: str = "val/loss"
    best_is: Literal["lowest", "highest"] = "lowest"

    def __post_init__(self) -> None:
        if self.every_n_steps is None and self.every_n_minutes is None:
            raise ConfigError("callbacks.checkpoint: every_n_steps and every_n_minutes are both null; set one of them")
        if self.every_n_steps is not None:
            at_least(1, "checkpoint.every_n_steps", self.every_n_steps, ", or null")
        if self.every_n_minutes is not None and not self.every_n_minutes > 0:
            raise ConfigError(
                f"callbacks.checkpoint.every_n_minutes={self.every_n_minutes}: must be above 0, or null for steps alone"
            )
        at_least(1, "checkpoint.keep", self.keep)
        at_least(0, "checkpoint.keep_best", self.keep_best)


def no_settings(callback: str) -> type[Any]:
    return make_dataclass(f"{callback}Settings", (), frozen=True)


@dataclass(frozen=True, kw_only=True)
class GarbageCollectionSettings:
    every_n_steps: int = 50

    def __post_init__(self) -> None:
        at_least(1, "garbage_collection.every_n_steps", self.every_n_steps)


@dataclass(frozen=True, kw_only=True)
class MemorySnapshotSettings:
    history: int = 0

    def __post_init__(self) -> None:
        at_least(0, "memory_snapshot.history", self.history, " (0 records no history)")


@dataclass(frozen=True, kw_only=True)
class PipelineTraceSettings:
    every_n_steps: int = 50
    keep: int = 5

    def __post_init__(self) -> None:
        at_least(1, "pipeline_trace.every_n_steps", self.every_n_steps)
        at_least(1, "pipeline_trace.keep", self.keep)


@dataclass(frozen=True, kw_only=True)
class LossSpikeSettings:
    threshold: float = 6.0
    window: int = 50
    max_returns: int = 3

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ConfigError(f"callbacks.loss_spike.threshold={self.threshold}: must be above 0")
        at_least(2, "loss_spike.window", self.window)
        at_least(0, "loss_spike.max_returns", self.max_returns)


CALLBACKS: dict[str, type[Any]] = {  # by the name in a YAML, which is also that of the file
    "expert_bias": ExpertBiasSettings,
    "balance_factor": BalanceFactorSettings,
    "skewed_start": SkewedStartSettings,
    "mtp_weight": MTPWeightSettings,
    "router_monitor": RouterMonitorSettings,
    "router_probe": no_settings("RouterProbe"),
    "weight_average": WeightAverageSettings,
    "throughput": ThroughputSettings,
    "loss_spike": LossSpikeSettings,
    "garbage_collection": GarbageCollectionSettings,
    "memory_snapshot": MemorySnapshotSettings,
    "pipeline_trace": PipelineTraceSettings,
    "sample_text": SampleTextSettings,
    "evaluate": EvaluateSettings,
    "checkpoint": CheckpointSettings,
    "progress": no_settings("Progress"),
    "run_report": no_settings("RunReport"),
}
CLASSES = {name: settings.__name__.removesuffix("Settings") for name, settings in CALLBACKS.items()}
