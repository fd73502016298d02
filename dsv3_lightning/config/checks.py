"""Checks beyond single sections: Trainer arguments that we rely on, callback names, and agreement of sections.

Everything here is plain arithmetic on plain values; types of the other Trainer and callback arguments are checked in
`instantiate`, which has to import their classes.
"""

import difflib
import math
import os
import re
from dataclasses import asdict
from typing import Any, Literal

from dsv3_lightning.callbacks.settings import CALLBACKS
from dsv3_lightning.common.typed import build, convert
from dsv3_lightning.common.wording import missing, nearest, show
from dsv3_lightning.config.lightning_names import (
    ACCELERATORS,
    DURATION,
    DURATION_PARTS,
    STRATEGIES,
    TRAINER_MORE,
)
from dsv3_lightning.config.pipeline import check_pipeline
from dsv3_lightning.data.config import DataConfig
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.model.balance_table import BALANCE_LOSSES
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.parallel.launch import fill_in
from dsv3_lightning.parallel.mesh import KINDS, MeshShape, StrategyConfig, mesh_shape
from dsv3_lightning.training.config import LossConfig

TRAINER: dict[str, Any] = {  # the Trainer arguments that every config has, as base.yaml lists them
    "max_steps": int,
    "precision": Literal["auto", 32, "32", "bf16-mixed", "bf16"],
    "accelerator": Literal[ACCELERATORS],
    "devices": int | str | list[int] | None,
    "num_nodes": int | None,
    "accumulate_grad_batches": int,
    "gradient_clip_val": float | None,
    "val_check_interval": int,
    "limit_val_batches": Any,
    "log_every_n_steps": int,
}
COUNTS = ("max_steps", "num_nodes", "accumulate_grad_batches", "val_check_interval", "log_every_n_steps")
LENGTH = "the run's length is counted in optimizer steps: set trainer.max_steps"
ELSEWHERE = {  # arguments of Lightning's that another setting decides
    "max_epochs": LENGTH,
    "min_epochs": LENGTH,
    "check_val_every_n_epoch": "validation is counted in optimizer steps: set trainer.val_check_interval",
    "callbacks": "callbacks have a section of their own, `callbacks:`",
    "strategy": "the strategy stands at the top level, `strategy:`",
    "default_root_dir": "the run's folder is run.dir/run.name",
    "plugins": "precision and checkpoint files are set by trainer.precision and callbacks.checkpoint",
    "enable_checkpointing": "set callbacks.checkpoint, null for none",
    "enable_progress_bar": "set callbacks.progress, null for none",
    "enable_model_summary": "`dsv3 plan` shows the parameters by part",
    "num_sanity_val_steps": "checks happen before the run",
    "use_distributed_sampler": "the data's order is a function of seed and sample number alone",
    "reload_dataloaders_every_n_epochs": "a run is one stream of samples",
    "limit_train_batches": LENGTH,
    "overfit_batches": LENGTH,
    "fast_dev_run": LENGTH,
    "barebones": "switch callbacks off by null instead",
}


def check_trainer(trainer: dict[str, Any]) -> dict[str, Any]:
    """The `trainer` section with known arguments converted: precision is text, counts are int. Raises ConfigError.

    devices and num_nodes are numbers; if null, those of the launcher that started this process.
    """
    for key, reason in ELSEWHERE.items():
        if key in trainer:
            raise ConfigError(f"trainer.{key}: not used here; {reason}")
    for key in TRAINER:
        if key not in trainer:
            raise ConfigError(missing(f"trainer.{key}"))
    known = TRAINER | TRAINER_MORE
    for key in trainer:
        if key not in known:
            raise ConfigError(f"trainer.{key}: no such argument of Trainer{nearest(str(key), known)}")
    trainer = {key: convert(value, known[key], f"trainer.{key}") for key, value in trainer.items()}
    check_finite(trainer, "trainer")
    for key in COUNTS:
        if trainer[key] is not None:
            check_count(f"trainer.{key}", trainer[key])
    clip, limit = trainer["gradient_clip_val"], trainer["limit_val_batches"]
    if clip is not None and clip < 0:
        raise ConfigError(f"trainer.gradient_clip_val={clip}: must be at least 0, or null for no clipping")
    if not (type(limit) is int and limit >= 0 or type(limit) is float and 0 <= limit <= 1):
        raise ConfigError(f"trainer.limit_val_batches={show(limit)}: must be a number of batches, or a share 0.0-1.0")
    if trainer["devices"] is not None:
        check_devices(trainer["devices"])
    check_duration(trainer.get("max_time"))
    for key in ("profiler", "logger"):
        blocks = trainer.get(key)
        for number, block in enumerate(blocks if isinstance(blocks, list) else [blocks]):
            if isinstance(block, dict) or (key == "logger" and block is not None and not isinstance(block, bool)):
                check_class_block(block, f"trainer.{key}[{number}]" if isinstance(blocks, list) else f"trainer.{key}")
    return fill_in(trainer | {"precision": str(trainer["precision"])}, os.environ)


def check_devices(devices: int | str | list[int]) -> None:
    """Raises ConfigError unless the value is a number of devices, -1 or auto for all, or a list of device numbers."""
    valid = "must be auto, -1 for all, a number from 1 on, or a list of different device numbers"
    if isinstance(devices, int):
        right = devices == -1 or devices >= 1
    elif isinstance(devices, str):
        right = devices == "auto" or re.fullmatch(r"-1|[1-9]\d*|\d+(,\s*\d+)*,?", devices) is not None
    else:
        right = 0 < len(devices) == len({device for device in devices if device >= 0})
    if not right:
        raise ConfigError(f"trainer.devices={show(devices)}: {valid}")


def check_duration(duration: str | dict[str, float] | None) -> None:
    if isinstance(duration, str) and re.fullmatch(DURATION, duration.strip()) is None:
        raise ConfigError(f"trainer.max_time={show(duration)}: must be DD:HH:MM:SS, such as 00:12:00:00")
    for key in duration if isinstance(duration, dict) else ():
        if key not in DURATION_PARTS:
            raise ConfigError(f"trainer.max_time.{key}: no such unit of time{nearest(str(key), DURATION_PARTS)}")


def check_callbacks(callbacks: dict[str, dict[str, Any] | None]) -> dict[str, dict[str, Any] | None]:
    """The section with our callbacks' arguments converted and completed. Raises ConfigError.

    The arguments of a class_path block are checked after its class is imported.
    """
    checked: dict[str, dict[str, Any] | None] = {}
    for name, block in callbacks.items():
        # null for an unknown name may switch off a class_path block of another file, unless it looks like a slip
        slip = difflib.get_close_matches(name, CALLBACKS) if block is None else "class_path" not in block
        if name not in CALLBACKS and slip:
            raise ConfigError(f"callbacks.{name}: no such callback, nor a class_path{nearest(name, CALLBACKS)}")
        check_finite(block, f"callbacks.{name}")
        if block is not None and "class_path" in block:
            check_class_block(block, f"callbacks.{name}")
        elif block is not None:
            block = asdict(build(CALLBACKS[name], block, f"callbacks.{name}"))
        checked[name] = block
    return checked


def names_classes(trainer: dict[str, Any], strategy: str | dict[str, Any], callbacks: dict[str, Any]) -> bool:
    """Whether anything remains that only an import can check."""
    blocks = [block for block in (strategy, *callbacks.values()) if isinstance(block, dict)]
    return bool({"logger", "profiler"} & trainer.keys()) or any(
        {"class_path", "dispatcher"} & block.keys() for block in blocks
    )


def check_class_block(block: Any, path: str) -> None:
    """Raises ConfigError unless it is {class_path: package.module.Class, init_args: {...}}."""
    if not isinstance(block, dict) or "class_path" not in block:
        raise ConfigError(f"{path}={show(block)}: needs a class_path")
    for key in block:
        if key not in ("class_path", "init_args"):
            raise ConfigError(f"{path}.{key}: not valid next to class_path; arguments go under init_args")
    class_path = block["class_path"]
    if not isinstance(class_path, str) or re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", class_path) is None:
        where = f"{path}.class_path={show(class_path)}"
        raise ConfigError(f"{where}: must be the full name of a class, such as package.module.Class")
    if not isinstance(block.get("init_args"), dict | None):
        raise ConfigError(f"{path}.init_args={show(block['init_args'])}: must be a section of arguments")


def check_finite(value: Any, key: str) -> None:
    """Raises ConfigError for a nan or inf anywhere in the value, which comparisons with limits may accept."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}={value}: must be a finite number")
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in parts:
        check_finite(part, f"{key}.{name}")


def mesh_strategy(strategy: str | dict[str, Any]) -> StrategyConfig | None:
    """The settings of one of our strategies, given by name or `kind`; None for others. Raises ConfigError."""
    if isinstance(strategy, str):
        if strategy in KINDS:
            return build(StrategyConfig, {"kind": strategy}, "strategy")
        if strategy not in STRATEGIES:
            names = (*KINDS, *STRATEGIES)
            raise ConfigError(f"strategy={show(strategy)}: no such strategy{nearest(strategy, names)}")
        return None
    if "class_path" in strategy:
        check_class_block(strategy, "strategy")
        return None
    return build(StrategyConfig, strategy, "strategy")


def check_strategy(strategy: str | dict[str, Any], trainer: dict[str, Any], model: ModelConfig) -> MeshShape | None:
    """The mesh if the strategy has one and the number of devices is known. Raises ConfigError if it doesn't fit."""
    config, devices = mesh_strategy(strategy), number_of_devices(trainer)
    if config is None or devices is None:
        return None
    return mesh_shape(config, devices * trainer["num_nodes"], devices, model)


def check_halves(strategy: str | dict[str, Any], data: DataConfig, trainer: dict[str, Any]) -> None:
    """Raises ConfigError if a rank's micro-batch has no two sequences for `overlap: two_batches`."""
    config, devices = mesh_strategy(strategy), number_of_devices(trainer)
    if config is None or config.overlap != "two_batches" or devices is None:
        return
    parts = devices * trainer["num_nodes"] * trainer["accumulate_grad_batches"]
    if data.batch_size < 2 * parts:
        raise ConfigError(
            f"data.batch_size={data.batch_size}: strategy.overlap=two_batches needs two sequences in each of "
            f"accumulate_grad_batches × devices × num_nodes = {parts} parts; use {2 * parts}, or overlap: none"
        )


def check_stages(strategy: str | dict[str, Any], trainer: dict[str, Any], model: ModelConfig, data: DataConfig) -> bool:
    """Whether the strategy has a pipeline. Raises ConfigError for one that doesn't fit."""
    config, devices = mesh_strategy(strategy), number_of_devices(trainer)
    if config is None or config.pipeline_parallel == 1:
        return False
    check_pipeline(config, model, data, trainer, None if devices is None else devices * trainer["num_nodes"])
    return True


def number_of_devices(trainer: dict[str, Any]) -> int | None:
    """Devices per node; None if it depends on the machine."""
    devices = trainer["devices"]
    count = len(devices) if isinstance(devices, list) else devices
    return count if type(count) is int and count > 0 else None


def check_count(key: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{key}={value}: must be at least 1 (optimizer steps and ranks are counted from 1)")


def check_together(
    model: ModelConfig, data: DataConfig, loss: LossConfig, trainer: dict[str, Any], callbacks: dict[str, Any],
    pipelined: bool = False,
) -> None:  # fmt: skip
    """Raises ConfigError if two sections contradict each other. pipelined: `check_stages` has seen the batch."""
    if data.sequence_length > model.max_position_embeddings:
        raise ConfigError(
            f"data.sequence_length={data.sequence_length}: "
            f"the model has positions for model.max_position_embeddings={model.max_position_embeddings}"
        )
    if data.sequence_length <= model.mtp_depth:
        raise ConfigError(
            f"data.sequence_length={data.sequence_length}: "
            f"must be above model.num_nextn_predict_layers={model.mtp_depth}, or MTP has nothing to predict"
        )
    if data.vocab_size > model.vocab_size:
        raise ConfigError(f"data.vocab_size={data.vocab_size}: model.vocab_size={model.vocab_size} has fewer")
    if not pipelined:
        check_batch("data.batch_size", data.batch_size, trainer, "accumulate_grad_batches", "devices", "num_nodes")
    if data.batch_ramp is not None and not pipelined:  # the number of micro-batches grows with it
        check_batch("data.batch_ramp.start", data.batch_ramp.start, trainer, "devices", "num_nodes")
        check_batch("data.batch_ramp.increment", data.batch_ramp.increment, trainer, "devices", "num_nodes")
    check_mtp_weight(model.mtp_depth, loss.mtp_weight, callbacks.get("mtp_weight"))
    if not model.num_moe_layers:
        for key, on, off in (
            ("callbacks.expert_bias", callbacks.get("expert_bias") is not None, "null"),
            ("callbacks.router_monitor", callbacks.get("router_monitor") is not None, "null"),
            ("callbacks.router_probe", callbacks.get("router_probe") is not None, "null"),
            ("loss.balance", loss.balance != "none", "none"),
        ):
            if on:
                raise ConfigError(f"{key}: the model has no mixture-of-experts layer; set {key}={off}")
    if callbacks.get("pipeline_trace") is not None and not pipelined:
        raise ConfigError(
            "callbacks.pipeline_trace: there is no pipeline; set it to null, or strategy.pipeline_parallel"
        )
    grouped = [name for name in loss.balance_factors if BALANCE_LOSSES[name].needs_groups]
    if model.n_group == 1 and grouped:
        raise ConfigError(f"loss.balance={min(grouped)}: its devices are the model's groups; set model.n_group above 1")
    if callbacks.get("expert_bias") is not None and model.topk_method != "noaux_tc":
        raise ConfigError(
            f"model.topk_method={model.topk_method}: has no expert bias to move; "
            "set callbacks.expert_bias=null, or topk_method=noaux_tc"
        )


def check_batch(key: str, batch_size: int, trainer: dict[str, Any], *factors: str) -> None:
    """Raises ConfigError if it isn't a multiple of the Trainer's factors; skipped if devices is `auto`."""
    ranks = number_of_devices(trainer)
    if ranks is None:
        return
    parts = math.prod((trainer | {"devices": ranks})[factor] for factor in factors)
    if batch_size % parts:
        below, above = batch_size // parts * parts, (batch_size // parts + 1) * parts
        raise ConfigError(
            f"{key}={batch_size}: does not divide into {' × '.join(factors)} = "
            f"{parts} equal parts; use {f'{below} or ' if below else ''}{above}"
        )


def check_mtp_weight(mtp_depth: int, constant: float | None, schedule: Any) -> None:
    """Raises ConfigError unless λ is set exactly once."""
    if mtp_depth and constant is None and schedule is None:
        raise ConfigError("loss.mtp_weight: MTP needs a λ; set loss.mtp_weight=0.3, or callbacks.mtp_weight")
    if mtp_depth and constant is not None and schedule is not None:
        raise ConfigError(
            f"loss.mtp_weight={constant}: callbacks.mtp_weight sets λ too; "
            "keep the constant with callbacks.mtp_weight=null, or the schedule with loss.mtp_weight=null"
        )
