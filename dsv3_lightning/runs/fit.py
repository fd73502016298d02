"""A run in five steps: open its folder, find what it starts from, build, prepare the data once, train."""

import os
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from dsv3_lightning.callbacks.dashboard import RunLogger
from dsv3_lightning.callbacks.loss_spike import LossSpiked
from dsv3_lightning.common.paths import display_path, user_path
from dsv3_lightning.config.compose import PRESETS, read_yaml
from dsv3_lightning.config.ecosystem import check_fresh
from dsv3_lightning.config.instantiate import build_callbacks
from dsv3_lightning.config.schema import Config
from dsv3_lightning.data.batches.module import TextDataModule
from dsv3_lightning.data.batches.ramp import tokens_of
from dsv3_lightning.data.text.progress import say
from dsv3_lightning.errors import RunStopped
from dsv3_lightning.hub.folder import WeightSource, check_same_model
from dsv3_lightning.hub.tokens import vocabulary_note
from dsv3_lightning.model.devices import device_of
from dsv3_lightning.model.fused import compile_all
from dsv3_lightning.parallel.checkpoints.one_file import made_with
from dsv3_lightning.parallel.environment import RECORDER, added, make_folder_of, run_environment, several_processes
from dsv3_lightning.parallel.groups import init_in_launchers_store
from dsv3_lightning.parallel.launch import notice_after, put_back, rank_of
from dsv3_lightning.parallel.meeting import FirstRank, meeting
from dsv3_lightning.planning.parameters import count_parameters
from dsv3_lightning.runs.failures import in_one_line, stop_if_another_died
from dsv3_lightning.runs.generating import generation_notes
from dsv3_lightning.runs.objective import build_data, build_module
from dsv3_lightning.runs.record import RunFolder
from dsv3_lightning.runs.returns import free_memory, record_return
from dsv3_lightning.runs.space import check_space
from dsv3_lightning.runs.start import weight_source
from dsv3_lightning.runs.trainer import (
    build_trainer,
    in_order,
    is_first_rank,
    quiet_libraries,
    refuse_fp8,
    refuse_taken_port,
    resolve_precision,
    run_device,
)
from dsv3_lightning.training.compiling import Compiler, choose, obstacle_here
from dsv3_lightning.training.hardware import FP8_LINES, hardware_lines
from dsv3_lightning.training.module import PretrainModule
from dsv3_lightning.training.precision import product_dtype


class Decision(NamedTuple):
    """What the first rank has found in the run's folder. precision, compiled: of the checkpoint's run."""

    finished: bool = False
    checkpoint: tuple[Path, int] | None = None
    precision: str | None = None
    compiled: bool | None = None


class Start(NamedTuple):
    """What a run starts from: a checkpoint and its step, or a folder of weights, or neither; and notes to print.

    precision, compiled: what the checkpoint was made with.
    """

    checkpoint: tuple[Path, int] | None
    precision: str | None
    compiled: bool | None
    source: WeightSource | None
    notes: list[str | None]


class Parts(NamedTuple):
    """The objects of a run. tree: the settings as recorded, with the precision that was chosen."""

    trainer: Trainer
    module: PretrainModule
    data: TextDataModule
    logger: RunLogger
    tree: dict[str, Any]


def fit(config: Config, tree: dict[str, Any], sources: list[Path]) -> int:
    """Trains to the last step, or says that the run is finished. Returns the exit status.

    sources: the files that the settings came from, which the run's folder keeps. Raises ConfigError and RunStopped.
    """
    quiet_libraries()
    rank_zero_only.rank = rank_of(config.trainer, os.environ)  # type: ignore[attr-defined]  # Lightning believes RANK
    folder = RunFolder(config)
    try:
        variables = run_environment(
            run_device(config).type, several_processes(config.trainer), folder.path / "flight_recorder", os.environ
        )
        with put_back(os.environ), added(os.environ, variables):
            refuse_taken_port(config)
            refuse_fp8(config)
            while (code := train_once(folder, config, tree, sources)) is None:
                free_memory()
            return code
    except Exception as error:
        if (reported := in_one_line(error, folder.path)) is error:
            raise
        raise reported from error
    finally:  # an exception inside of Lightning keeps this frame, and the lock with it, until garbage is collected
        folder.lock.release(force=True)


def train_once(folder: RunFolder, config: Config, tree: dict[str, Any], sources: list[Path]) -> int | None:
    """Trains from the newest checkpoint, if any. Returns the exit status; None to start again from an earlier one."""
    first = FirstRank(meeting(config.trainer, rank_zero_only.rank), str(folder.path))  # type: ignore[attr-defined]
    decision = open_run(first, folder, tree)
    if decision.finished:
        return 0
    start = find_start(decision, config)
    parts, reason = build(folder, config, tree, start, first.attempt)
    doing = "prepares the run's data (`dsv3 prepare CONFIG` does that once, before a run)"
    compiler = Compiler(user_path(config.compute.compile_cache), product_dtype(str(parts.tree["trainer"]["precision"])))
    compiled = first.decides(
        "data", lambda: prepare_once(folder, config, sources, start, parts, reason, compiler), doing
    )
    parts.tree["compute"]["compile"] = compiled
    compiler.load() if compiled else compile_all(False)
    make_folder_of(os.environ.get(RECORDER))
    try:
        return train(parts, start)
    except LossSpiked as spiked:
        record_return(folder.path, parts.trainer, parts.data, spiked)
        return None


def open_run(first: FirstRank, folder: RunFolder, tree: dict[str, Any]) -> Decision:
    """Takes the folder of an existing run, which the first rank looks through for all. Raises ConfigError."""
    decided = first.decides("start", lambda: look(folder, tree), "chooses a checkpoint")
    if decided["finished"]:
        if is_first_rank():
            shown = display_path(folder.path)
            print(f"{shown}: this run is finished, nothing to do; its report is {shown}/report.md")
        first.wait_for_others("start", seconds=60)
        return Decision(finished=True)
    if decided["checkpoint"] is None:
        return Decision()
    path, step = decided["checkpoint"]
    return Decision(False, (Path(path), step), decided["precision"], decided["compiled"])


def look(folder: RunFolder, tree: dict[str, Any]) -> dict[str, Any]:
    """A Decision in JSON: whether the run is finished, or the newest valid checkpoint. Raises ConfigError."""
    if not folder.lock.is_locked and folder.stored_tree() is not None:
        folder.reopen(tree)
    if folder.finished() and folder.resumes_own():
        return {"finished": True}
    if (checkpoint := folder.resume_from(tree)) is None:
        return {"finished": False, "checkpoint": None}
    path, step = checkpoint
    settings = made_with(path)[0]
    begun = {"precision": str(settings["trainer"]["precision"]), "compiled": settings["compute"].get("compile") is True}
    return {"finished": False, "checkpoint": [str(path), step], **begun}


def find_start(decision: Decision, config: Config) -> Start:
    """Checks what the run starts from, before anything is built. Raises ConfigError."""
    if decision.checkpoint is not None:  # the folder that the run began from is of no use to it any more
        return Start(decision.checkpoint, decision.precision, decision.compiled, None, [])
    return Start(None, None, None, *open_source(config))


def build(
    folder: RunFolder, config: Config, tree: dict[str, Any], start: Start, attempt: str | None
) -> tuple[Parts, str]:
    """The run's objects, and why this precision. attempt: as FirstRank's. Raises ConfigError."""
    callbacks = in_order(build_callbacks(config), config)
    if start.checkpoint is None:
        check_fresh(callbacks)
    precision, reason = resolve_precision(config, folder, start.precision)
    recorded = tree | {"trainer": tree["trainer"] | {"precision": precision}, "compute": dict(tree["compute"])}
    logger = RunLogger(str(folder.path), start.checkpoint[1] if start.checkpoint else None)
    trainer = build_trainer(config, folder, logger, callbacks, precision)
    if isinstance(trainer.strategy, DDPStrategy | ModelParallelStrategy):  # ours is one of the second kind
        init_in_launchers_store(
            attempt, trainer.strategy._get_process_group_backend(), trainer.strategy._timeout or default_pg_timeout,
            trainer.strategy.root_device,
        )  # fmt: skip
    module = build_module(config, start.source)
    module.settings = recorded
    data = build_data(config, module, folder.data_inputs())
    module.ramp = data.micro_batches
    return Parts(trainer, module, data, logger, recorded), reason


def prepare_once(
    folder: RunFolder, config: Config, sources: list[Path], start: Start, parts: Parts, reason: str, compiler: Compiler
) -> bool:
    """Prepares the data, makes the run's folder if it isn't there, and says what is about to happen: first rank only.
    Returns whether functions are compiled.

    The folder is made once everything has been checked, so that settings that fail don't block its name.
    """
    said: list[str] = []
    blocked = obstacle_here(run_device(config).type)
    if blocked is None and config.compute.compile and start.compiled is not False:
        compiler.start()
    prepared = parts.data.prepare_tokens(tell=said.append)
    if start.checkpoint is None or start.checkpoint[1] < config.trainer["max_steps"]:
        space = check_space(config, folder.path, parts.tree["trainer"]["precision"])
        said += [space] if space is not None else []
        said += generation_notes(config)
    note = vocabulary_note(parts.data.tokenizer, config.model.vocab_size, "model.vocab_size")
    choice = choose(config.compute.compile, start.compiled, blocked, compiler.wait)
    parts.tree["compute"]["compile"] = choice.on
    folder.create(parts.tree, sources)
    folder.keep_data(prepared)
    banner(config, folder, start.checkpoint, reason, str(parts.tree["trainer"]["precision"]))
    if start.checkpoint is not None:
        folder.begin(start.checkpoint)
    else:
        for line in filter(None, [*start.notes, note]):
            print(line, flush=True)
        parts.logger.rewind({})  # of a session that left no checkpoint
        defaults = read_yaml(Path(str(PRESETS / "base.yaml")))
        parts.logger.describe(parts.tree, len(parts.data.origins), defaults)
    for line in [*said, *([choice.line] if choice.line else [])]:
        say(line)
    return choice.on


def train(parts: Parts, start: Start) -> int:
    """Fits to the last step; only validates a run that was stopped between its last step and its report."""
    trainer, size, checkpoint = parts.trainer, parts.trainer.world_size, start.checkpoint
    meeting = f"rank {trainer.global_rank} of {size} waits for the others, up to strategy.timeout_minutes (else 30)"
    try:
        with notice_after(30.0, meeting, unless=lambda: size == 1 or torch.distributed.is_initialized()):
            if checkpoint is not None and checkpoint[1] >= trainer.max_steps:
                trainer.validate(parts.module, parts.data, ckpt_path=checkpoint[0], weights_only=True, verbose=False)
            else:
                trainer.fit(parts.module, parts.data, ckpt_path=checkpoint and checkpoint[0], weights_only=True)
    except LossSpiked:
        raise
    except RuntimeError as error:  # of a collective, too
        if isinstance(error, RunStopped) and not trainer.is_global_zero:
            return error.code  # all ranks stop together, and the first one says why
        stop_if_another_died(trainer, error)
        raise
    return 0


def open_source(config: Config) -> tuple[WeightSource | None, list[str | None]]:
    """The folder that the run starts from, and notes to print. Raises ConfigError where it has another model."""
    if config.init_from is None:
        return None, []
    source = weight_source(config.init_from)
    differing = check_same_model(source.config, config.model, config.init_from)
    source.audit()
    loss = f"loss.balance={config.loss.balance}, loss.balance_factor={config.loss.balance_factor} (this run's own)"
    return source, [*source.notes, *differing, f"weights of {config.init_from}; {loss}"]


def banner(config: Config, folder: RunFolder, start: tuple[Path, int] | None, reason: str, precision: str) -> None:
    """What is about to happen, before the first step."""
    counts = count_parameters(config.model)
    max_steps = config.trainer["max_steps"]
    tokens = tokens_of(config.data, max_steps)
    print(
        f"{display_path(folder.path)}: {counts.total:,} parameters, {counts.active:,} active per token; "
        f"{max_steps:,} steps, {tokens:,} tokens"
    )
    print(f"{reason}; dashboard: tensorboard --logdir {shlex.quote(display_path(config.run.dir))}")
    device, data = device_of(run_device(config)), config.data
    for line in hardware_lines(config.model, device, precision, data.sequence_length, data.isolate_documents):
        print(line)
    if config.compute.fp8:
        print(FP8_LINES[config.compute.fp8])
    print(
        f"continuing after step {start[1]} from {display_path(start[0])}" if start else "starting a new run", flush=True
    )
