"""From checked settings to live objects: Trainer arguments, strategy and callbacks, typed by jsonargparse.

The only file here that needs torch; `check_objects` is what `dsv3 validate` adds to `schema.check`.
"""

import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import Strategy, StrategyRegistry

from dsv3_lightning.config.arguments import Arguments
from dsv3_lightning.config.checks import mesh_strategy
from dsv3_lightning.config.registry import CALLBACKS
from dsv3_lightning.config.schema import Config
from dsv3_lightning.config.wording import nearest, show
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.model.experts import Dispatcher
from dsv3_lightning.parallel.strategy import MeshStrategy

OUR_CALLBACKS = Path(__file__).resolve().parents[1].joinpath("callbacks").resolve()  # a top-level folder in a checkout


def check_objects(config: Config) -> None:
    """Everything that names a class or an argument of one. Raises ConfigError."""
    Arguments(Trainer, config.trainer, "trainer", skip=("precision",))
    build_strategy(config)
    build_callbacks(config)


def build_trainer_arguments(config: Config) -> dict[str, Any]:
    """The `trainer` section as arguments for a Trainer, with class_path blocks built; precision is left as text."""
    built = Arguments(Trainer, config.trainer, "trainer", skip=("precision",)).build()
    return {key: built.get(key, value) for key, value in config.trainer.items()}


def build_strategy(config: Config) -> str | Strategy:
    """One of our strategies over a mesh, Lightning's own name of one, or what a class_path block describes."""
    mesh = mesh_strategy(config.strategy)
    if mesh is not None:
        dispatcher = import_class(mesh.dispatcher, Dispatcher, "strategy.dispatcher")
        return MeshStrategy(**asdict(mesh) | {"dispatcher": dispatcher})
    if isinstance(config.strategy, dict):
        return build(Strategy, config.strategy, "strategy")
    names = ["auto", *StrategyRegistry.available_strategies()]
    if config.strategy not in names:
        raise ConfigError(f"strategy={show(config.strategy)}: no such strategy{nearest(config.strategy, names)}")
    return config.strategy


def build_callbacks(config: Config, registry: Mapping[str, str] = CALLBACKS) -> dict[str, Callback]:
    """The callbacks by name, in the order of the YAML; those set to null are left out."""
    built = {}
    for name, block in config.callbacks.items():
        path = f"callbacks.{name}"
        if block is not None and "class_path" in block:
            built[name] = build(Callback, block, path)
        elif block is not None:
            cls = import_class(registry[name], Callback, f"{path}.class_path")
            built[name] = Arguments(cls, block, path).build()
    return built


def build(base: type, block: dict[str, Any], path: str) -> Any:
    """The object of a block {class_path, init_args}. Raises ConfigError."""
    if "class_path" not in block:
        raise ConfigError(f"{path}={show(block)}: needs a class_path")
    for key in block:
        if key not in ("class_path", "init_args"):
            raise ConfigError(f"{path}.{key}: not valid beside class_path; arguments stand under init_args")
    cls, path = import_class(block["class_path"], base, f"{path}.class_path"), f"{path}.init_args"
    return Arguments(cls, block.get("init_args") or {}, path).build()


def import_class(class_path: Any, base: type, path: str) -> type:
    """A subclass of `base` (or class with its methods) from anywhere, modules of the current folder included."""
    where, (module, _, name) = f"{path}={show(class_path)}", str(class_path).rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the scripts `dsv3` and `lightning` start without it, `python -m` with it
    if not module:
        raise ConfigError(f"{where}: must be the full name of a class, such as package.module.Class")
    try:
        source = getattr(importlib.import_module(module), "__file__", None) or ""
        found = getattr(sys.modules[module], name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{where}: is not a {base.__name__} ({base.__module__})")
    if OUR_CALLBACKS in Path(source).resolve().parents and not module.startswith("dsv3_lightning."):
        raise ConfigError(f"{where}: write dsv3_lightning.{class_path}, or the class exists twice")
    return found
