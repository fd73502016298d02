"""Builds the objects that a configuration names, and starts or continues the run."""

import logging
import os
import shlex
import socket
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from dsv3_lightning.callbacks.checkpoint import Checkpoint
from dsv3_lightning.callbacks.dashboard import RunLogger
from dsv3_lightning.common.files import write_file
from dsv3_lightning.common.paths import display_path
from dsv3_lightning.config.compose import PRESETS
from dsv3_lightning.config.ecosystem import check_fresh
from dsv3_lightning.config.instantiate import (
    build_callbacks,
    build_loggers,
    build_strategy,
    build_trainer_arguments,
)
from dsv3_lightning.config.schema import Config
from dsv3_lightning.data.batches.module import TextDataModule
from dsv3_lightning.data.batches.ramp import tokens_of
from dsv3_lightning.data.text.prepare import prepare
from dsv3_lightning.data.text.store import read_manifest
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError, RunStopped
from dsv3_lightning.hub.folder import WeightSource, check_same_model
from dsv3_lightning.hub.tokens import vocabulary_note
from dsv3_lightning.parallel.checkpoints.one_file import AtomicCheckpointIO, made_with
from dsv3_lightning.parallel.groups import init_after_restart
from dsv3_lightning.parallel.launch import a_word_after, find_launch, put_back, rank_of, wait_for_first_rank
from dsv3_lightning.parallel.lost import ERRORS, peer_failure
from dsv3_lightning.planning.parameters import count_parameters
from dsv3_lightning.runs.record import RunFolder
from dsv3_lightning.runs.start import weight_source
from dsv3_lightning.training.module import PretrainModule
from dsv3_lightning.training.precision import choose_precision, precision_plugin


def fit(config: Config, tree: dict[str, Any], sources: list[Path]) -> int:
    """Trains to the last step, or says that this is done. Returns the exit status."""
    quiet_libraries()
    rank_zero_only.rank = rank_of(config.trainer, os.environ)  # type: ignore[attr-defined]  # Lightning believes RANK
    folder = RunFolder(config)
    try:
        with put_back(os.environ):
            return train(config, tree, sources, folder)
    finally:  # an exception inside of Lightning keeps this frame, and the lock with it, until garbage is collected
        folder.lock.release(force=True)


def train(config: Config, tree: dict[str, Any], sources: list[Path], folder: RunFolder) -> int:
    first_rank = is_first_rank()
    if not first_rank:
        wait_for_first_rank(folder.path / "config.yaml", rank_zero_only.rank)  # type: ignore[attr-defined]
    if first_rank and folder.stored_tree() is not None:
        folder.claim(tree, sources)
    if folder.finished() and folder.goes_on():  # seen by each rank: none waits for another that is done
        if first_rank:
            shown = display_path(folder.path)
            print(f"{shown}: this run is finished, nothing to do; its report is {shown}/report.md")
        return 0
    refuse_taken_port(config)
    source, notes = open_source(config)
    callbacks = in_order(build_callbacks(config), config)
    start = folder.resume_from(tree)
    if start is None:
        check_fresh(callbacks)
    precision, reason = resolve_precision(config, folder, start)
    tree["trainer"]["precision"] = precision
    logger = RunLogger(str(folder.path), start[1] if start else None)
    trainer = build_trainer(config, folder, logger, callbacks, precision)
    if isinstance(trainer.strategy, DDPStrategy | ModelParallelStrategy):  # ours is one of the second kind
        init_after_restart(
            trainer.strategy._get_process_group_backend(), trainer.strategy._timeout or default_pg_timeout
        )
    module = PretrainModule(
        config.model, config.optimizer, config.loss, config.compute,
        config.data.sequence_length, config.trainer["max_steps"], config.run.seed,
        source if start is None else None,
    )  # fmt: skip
    module.settings = tree
    whole_steps = module.balance.needs_counts and config.trainer["accumulate_grad_batches"] > 1
    data = TextDataModule(config.data, config.model.mtp_depth, config.trainer["max_steps"], whole_steps,
                          config.trainer["limit_val_batches"])  # fmt: skip
    if first_rank:
        prepared = prepare(config.data, tell=None)  # the data module tells, when training starts
        notes += [vocabulary_note(Tokenizer.from_file(prepared), config.model.vocab_size, "model.vocab_size")]
        folder.claim(tree, sources)  # not before all is found to be right: settings that failed don't block the name
        banner(config, folder, start, reason)
        if start is not None:
            folder.begin(start)
        for note in filter(None, notes if start is None else []):
            print(note, flush=True)
        if start is None:
            logger.rewind({})  # of a life that left no checkpoint
            defaults = yaml.safe_load((PRESETS / "base.yaml").read_text(encoding="utf-8"))
            logger.describe(tree, len(read_manifest(prepared)["origins"]), defaults)
        for file in prepared.glob("tokenizer*.json"):  # so that the folder is all that generating needs
            write_file(folder.path / file.name, file.read_bytes())
    size = trainer.world_size
    meeting = f"rank {trainer.global_rank} of {size} waits for the others, up to strategy.timeout_minutes (else 30)"
    try:
        with a_word_after(30.0, meeting, unless=lambda: size == 1 or torch.distributed.is_initialized()):
            if start is not None and start[1] >= config.trainer["max_steps"]:  # stopped between last step and report
                trainer.validate(module, data, ckpt_path=start[0], weights_only=True, verbose=False)
            else:
                trainer.fit(module, data, ckpt_path=start and start[0], weights_only=True)
    except ERRORS as error:
        if isinstance(error, RunStopped) and not trainer.is_global_zero:
            return error.code  # all ranks stop together, and the first one says why
        stop_if_another_died(trainer, error)
        raise
    return 0


def stop_if_another_died(trainer: Trainer, error: BaseException) -> None:
    """Raises RunStopped where the error came of that, and ends the ranks that this one has started."""
    if isinstance(error, RunStopped):
        return
    watched = getattr(trainer.strategy.launcher, "procs", [])
    started = watched.copy()
    watched.clear()  # or Lightning's observer, which looks every 5 s, kills this process before it has said why
    time.sleep(0.5)  # until it is known what became of them
    lost = peer_failure(error, started)
    if lost is None:
        watched.extend(started)
    else:
        for process in started:
            process.kill()
        who = f"rank {trainer.global_rank} stops"
        raise RunStopped(f"{who}: {lost}; the same command goes on from the newest checkpoint") from error


def in_order(callbacks: dict[str, Callback], config: Config) -> list[Callback]:
    """Ours, the note that a step is done, and those of others. Lightning moves checkpoint callbacks to the end."""
    others = [callback for name, callback in callbacks.items() if "class_path" in (config.callbacks[name] or {})]
    ours = [callback for callback in callbacks.values() if callback not in others]
    return [*ours, *(callback.step_done for callback in ours if isinstance(callback, Checkpoint)), *others]


def open_source(config: Config) -> tuple[WeightSource | None, list[str | None]]:
    """The folder that the run starts from, and what to tell of it. Raises ConfigError where it has another model."""
    if config.init_from is None:
        return None, []
    source = weight_source(config.init_from)
    differing = check_same_model(source.config, config.model, config.init_from)
    source.audit()
    loss = f"loss.balance={config.loss.balance}, loss.balance_factor={config.loss.balance_factor} (this run's own)"
    return source, [*source.notes, *differing, f"weights of {config.init_from}; {loss}"]


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
    kinds = [kind.__name__ for callback in callbacks for kind in type(callback).__mro__]
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
            enable_checkpointing="Checkpoint" in kinds,
            enable_progress_bar="ProgressBar" in kinds,
            enable_model_summary=False,
        )
    except (ValueError, MisconfigurationException) as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from None


def is_first_rank() -> bool:
    """Known before there is a Trainer: `run` has put it there."""
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]  # Lightning hangs the rank on this function


def run_device(config: Config) -> torch.device:
    """The kind of device the run will be on."""
    wanted = config.trainer.get("accelerator", "auto")
    if wanted in ("cpu", "mps", "cuda"):
        return torch.device(wanted)
    available = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return available or torch.device("cpu")


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


def resolve_precision(config: Config, folder: RunFolder, start: tuple[Path, int] | None) -> tuple[str, str]:
    """The precision and why. A run keeps the one it began with: a second measurement might choose another."""
    if config.trainer["precision"] != "auto":
        return choose_precision(str(config.trainer["precision"]), run_device(config))
    if start is not None:
        precision = str(made_with(start[0])[0]["trainer"]["precision"])
        return precision, f"precision {precision}, as in the checkpoint"
    stored = folder.stored_tree()  # the first rank has measured for all
    if stored is not None:
        precision = str(stored["trainer"]["precision"])
        return precision, f"precision {precision}, as this run began"
    return choose_precision("auto", run_device(config))


def banner(config: Config, folder: RunFolder, start: tuple[Path, int] | None, reason: str) -> None:
    """What is about to happen, before the first step."""
    counts = count_parameters(config.model)
    max_steps = config.trainer["max_steps"]
    tokens = tokens_of(config.data, max_steps)
    print(
        f"{display_path(folder.path)}: {counts.total:,} parameters, {counts.active:,} active per token; "
        f"{max_steps:,} steps, {tokens:,} tokens"
    )
    print(f"{reason}; dashboard: tensorboard --logdir {shlex.quote(display_path(config.run.dir))}")
    print(f"continuing after step {start[1]} from {display_path(start[0])}" if start else "starting anew", flush=True)


def quiet_libraries() -> None:
    """Hides what tells a user nothing: Lightning's device list and tips, and warnings about our own choices."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the loader is faster than the model
    warnings.filterwarnings("ignore", "Total length of `list`.*")  # no validation documents, as we said ourselves
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")  # a short run; the last step is shown
    warnings.filterwarnings("ignore", ".*fit.ckpt_path=(None|.last.)\\W+(was called|is set, but)")  # `check_fresh`
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")  # the run goes on
    warnings.filterwarnings("ignore", ".*isinstance\\(treespec, LeafSpec\\).*")
