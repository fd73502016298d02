"""Lightning's Trainer for a run: its arguments, precision, device and callbacks in order."""

import logging
import os
import socket
import threading
import warnings
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint as CheckpointBase
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from dsv3_lightning.callbacks.checkpoint import Checkpoint
from dsv3_lightning.callbacks.dashboard import RunLogger
from dsv3_lightning.config.instantiate import (
    build_loggers,
    build_strategy,
    build_trainer_arguments,
)
from dsv3_lightning.config.schema import Config
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.model.devices import device_of
from dsv3_lightning.model.fp8_cuda import refusal
from dsv3_lightning.parallel.checkpoints.one_file import AtomicCheckpointIO
from dsv3_lightning.parallel.launch import find_launch
from dsv3_lightning.runs.failures import hide_event_thread
from dsv3_lightning.runs.record import RunFolder
from dsv3_lightning.training.precision import choose_precision, precision_plugin


def build_trainer(
    config: Config, folder: RunFolder, logger: RunLogger, callbacks: list[Any], precision: str
) -> Trainer:
    """Lightning's Trainer. A run is one endless stream of samples, so that epochs never cut a step short."""
    arguments = build_trainer_arguments(config)
    del arguments["precision"]
    accumulate = arguments["accumulate_grad_batches"]
    # Lightning counts micro-batches, we count optimizer steps, and in validation batches of data.batch_size samples.
    arguments["val_check_interval"] *= accumulate
    arguments["limit_val_batches"] = float(bool(arguments["limit_val_batches"]))  # the data module does the rest
    try:
        return Trainer(
            **arguments,
            strategy=build_strategy(config),
            plugins=[precision_plugin(precision, run_device(config)), AtomicCheckpointIO()],
            logger=[logger, *build_loggers(config)],
            callbacks=callbacks,
            default_root_dir=folder.path,
            max_epochs=-1,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_checkpointing=any(isinstance(one, CheckpointBase) for one in callbacks),
            enable_progress_bar=any(isinstance(one, ProgressBar) for one in callbacks),
            enable_model_summary=False,
        )
    except (ValueError, MisconfigurationException) as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from None


def in_order(callbacks: dict[str, Callback], config: Config) -> list[Callback]:
    """Ours, the note that a step is done, and those of others. Lightning moves checkpoint callbacks to the end."""
    others = [callback for name, callback in callbacks.items() if "class_path" in (config.callbacks[name] or {})]
    ours = [callback for callback in callbacks.values() if callback not in others]
    return [*ours, *(callback.step_done for callback in ours if isinstance(callback, Checkpoint)), *others]


def run_device(config: Config) -> torch.device:
    """The kind of device the run will be on."""
    wanted = config.trainer.get("accelerator", "auto")
    if wanted in ("cpu", "mps", "cuda"):
        return torch.device(wanted)
    available = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return available or torch.device("cpu")


def refuse_fp8(config: Config) -> None:
    """Raises ConfigError where compute.fp8 asks for products that the run's device doesn't have."""
    if config.compute.fp8 is not True:
        return
    why = refusal(device_of(run_device(config)), torch.version.cuda, hasattr(torch.nn.functional, "scaled_mm"))
    if why is not None:
        raise ConfigError(f"compute.fp8=true: {why}; valid here: false, or emulated for its numerics")


def resolve_precision(config: Config, folder: RunFolder, begun_with: str | None) -> tuple[str, str]:
    """The precision and why. A run keeps the one it began with: a second measurement might choose another.

    begun_with: the precision of the checkpoint that it resumes from.
    """
    if config.trainer["precision"] != "auto":
        return choose_precision(str(config.trainer["precision"]), run_device(config))
    if begun_with is not None:
        return begun_with, f"precision {begun_with}, as in the checkpoint"
    stored = folder.stored_tree()  # the first rank has measured for all
    if stored is not None:
        precision = str(stored["trainer"]["precision"])
        return precision, f"precision {precision}, as this run began"
    return choose_precision("auto", run_device(config))


def refuse_taken_port(config: Config) -> None:
    """Where this process is to launch the other ranks: a port that is in use would leave them all waiting."""
    port, launched = os.environ.get("MASTER_PORT"), find_launch(os.environ).launcher or "LOCAL_RANK" in os.environ
    if port is None or launched or config.trainer["devices"] in (1, "auto") or not is_first_rank():
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(port)))
        except (OSError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"MASTER_PORT={port}: can't be used ({error}); unset it, and a free one is taken"
            ) from None


def is_first_rank() -> bool:
    """Known before there is a Trainer: `run` has put it there."""
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]  # Lightning hangs the rank on this function


def quiet_libraries() -> None:
    """Hides what is of no use to users: Lightning's device list and tips, and warnings about our own choices."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    threading.excepthook = hide_event_thread
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the loader is faster than the model
    warnings.filterwarnings("ignore", "Total length of `list`.*")  # no validation documents, as we said ourselves
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")  # a short run; the last step is shown
    warnings.filterwarnings("ignore", ".*fit.ckpt_path=(None|.last.)\\W+(was called|is set, but)")  # `check_fresh`
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")  # the run resumes
    warnings.filterwarnings("ignore", ".*isinstance\\(treespec, LeafSpec\\).*")
