"""Support for Lightning's callbacks and loggers; docs/lightning.md has the full table."""

import importlib.util
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, callbacks, loggers

from dsv3_lightning.callbacks.dashboard import logged_tags
from dsv3_lightning.common.wording import nearest
from dsv3_lightning.config.checks import mesh_strategy
from dsv3_lightning.errors import ConfigError

BATCH = "data.batch_size counts the samples of a step over all ranks and micro-batches"
REFUSED: dict[type, str] = {  # {class, with its subclasses: reason and replacement}
    callbacks.BackboneFinetuning: "the model has no `backbone`; init_from starts from the weights of another model",
    callbacks.BasePredictionWriter: "a run makes no predictions; dsv3 generate does",
    callbacks.BatchSizeFinder: f"{BATCH}; dsv3 plan shows their memory, trainer.accumulate_grad_batches lowers it",
    callbacks.GradientAccumulationScheduler: f"{BATCH}; data.batch_ramp lets it grow",
    callbacks.LearningRateFinder: "it would train before the run, on the run's data; dsv3 sweep compares rates",
    callbacks.ModelPruning: "it replaces the model's parameters by others, which checkpoints and exports don't know",
    callbacks.SpikeDetection: "it can't read the state that it saves, so that the run could not resume; "
    "optimizer.max_skipped_steps stops a run that is not finite",
    callbacks.StochasticWeightAveraging: "it works by epochs, and a run is a single one; use callbacks.weight_average",
}
BASES: tuple[type, ...] = (
    callbacks.BaseFinetuning, Callback, callbacks.Checkpoint, callbacks.ProgressBar, loggers.Logger,
)  # fmt: skip
LOGGERS = (loggers.Logger, loggers.LitLogger)  # which in Lightning 2.6 is not made from Logger
PACKAGES: dict[type, tuple[str, str]] = {  # the module that a class needs beyond Lightning's own, and its package
    callbacks.DeviceStatsMonitor: ("psutil", "psutil"),
    loggers.CometLogger: ("comet_ml", "comet-ml"),
    loggers.LitLogger: ("litlogger", "litlogger"),
    loggers.MLFlowLogger: ("mlflow", "mlflow"),
    loggers.WandbLogger: ("wandb", "wandb"),
}


def check_class(cls: type, path: str) -> None:
    """Raises ConfigError if a run can't use such a callback or logger, or if its package is missing."""
    if cls in BASES:
        raise ConfigError(f"{path}: {cls.__name__} is a base class that does nothing; name a subclass of it")
    for refused, reason in REFUSED.items():
        if issubclass(cls, refused):
            raise ConfigError(f"{path}: {refused.__name__} can't be used here: {reason}")
    for needing, (module, package) in PACKAGES.items():
        if issubclass(cls, needing) and importlib.util.find_spec(module) is None:
            raise ConfigError(f"{path}: {needing.__name__} needs the package {package}, which is not installed")


def check_version(cls: type, init_args: Mapping[str, Any], path: str) -> None:
    """Raises ConfigError for a logger that on resume would delete what an earlier start has written."""
    version = init_args.get("version")
    if issubclass(cls, loggers.CSVLogger) and version is not None:
        raise ConfigError(
            f"{path}.version={version!r}: CSVLogger deletes the file of that version when the run resumes; "
            "leave it out, and each start of the run writes its own version"
        )


def check_set(built: Mapping[str, Callback], strategy: Any, folder: Path) -> None:
    """Checks callbacks against each other. A ModelCheckpoint without `dirpath` gets a separate folder in the run's.

    built: callbacks by name. folder: the run's. Raises ConfigError for two progress bars, two callbacks whose states
    Lightning couldn't distinguish, averages of sharded weights, and files among the run's own checkpoints.
    """
    states: dict[str, str] = {}
    for name, callback in built.items():
        path = f"callbacks.{name}"
        if isinstance(callback, callbacks.WeightAveraging) and mesh_strategy(strategy) is not None:
            raise ConfigError(f"{path}: can't average sharded weights; callbacks.weight_average does")
        if isinstance(callback, callbacks.ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = os.path.abspath(folder / "checkpoints" / name)
        dirpath = getattr(callback, "dirpath", None)
        if dirpath is not None and os.path.realpath(dirpath) == os.path.realpath(folder / "checkpoints"):
            raise ConfigError(f"{path}.init_args.dirpath={dirpath}: is for the run's own checkpoints; use another")
        if type(callback).state_dict is not Callback.state_dict:
            twin = states.setdefault(callback.state_key, name)
            if twin != name:
                raise ConfigError(f"{path}: its saved state would have the same name as that of callbacks.{twin}")
    bars = [name for name, callback in built.items() if isinstance(callback, callbacks.ProgressBar)]
    if len(bars) > 1:
        raise ConfigError(f"callbacks.{bars[-1]}: a run has one progress bar; set callbacks.{bars[0]}=null")


def check_monitors(built: Mapping[str, Callback], tree: dict[str, Any]) -> None:
    """Raises ConfigError for a monitored name that nothing logs. Users' callbacks may log any name."""
    known = [name for names in logged_tags(tree, origins=2).values() for name in names]
    own = ("lightning.", "dsv3_lightning.")
    if any(isinstance(callback, callbacks.LearningRateMonitor) for callback in built.values()):
        known.append("lr-.*")
    for name, callback in built.items():
        monitor = getattr(callback, "monitor", None)
        if not isinstance(callback, callbacks.EarlyStopping | callbacks.ModelCheckpoint) or monitor is None:
            continue
        if any(re.fullmatch(tag.removesuffix("$"), monitor) for tag in (*known, "epoch", "step")):
            continue
        if all(type(other).__module__.startswith(own) for other in built.values()):
            plain = [tag.removesuffix("$").replace(r"\d+", "1").replace(r"_\w+", "") for tag in known]
            key = f"callbacks.{name}.init_args.monitor={monitor}"
            raise ConfigError(f"{key}: nothing of that name is logged{nearest(monitor, plain)}")


def check_fresh(built: Collection[Callback]) -> None:
    """Raises ConfigError if a new run would resume from a file that Lightning finds on its own.

    With an OnExceptionCheckpoint, Lightning looks for its file and for the newest of each ModelCheckpoint.
    """
    watchers = [callback for callback in built if isinstance(callback, callbacks.OnExceptionCheckpoint)]
    files = [Path(watcher.ckpt_path) for watcher in watchers]
    for callback in built:
        if watchers and isinstance(callback, callbacks.ModelCheckpoint) and callback.dirpath is not None:
            files += Path(callback.dirpath).glob(f"{callback.CHECKPOINT_NAME_LAST}*{callback.FILE_EXTENSION}")
    for file in files:
        if file.exists():
            raise ConfigError(f"{file}: Lightning would resume from it; remove it, or name it as run.resume")
