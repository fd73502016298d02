"""Instantiation of Trainer arguments, strategy and callbacks from checked settings, with types from jsonargparse.

Needs torch; `check_objects` is what `dsv3 validate` adds to `schema.check`.
"""

import importlib
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy

from dsv3_lightning import callbacks
from dsv3_lightning.callbacks.settings import CLASSES
from dsv3_lightning.common.wording import show
from dsv3_lightning.config.arguments import Arguments
from dsv3_lightning.config.checks import check_class_block, mesh_strategy
from dsv3_lightning.config.ecosystem import LOGGERS, check_class, check_monitors, check_set, check_version
from dsv3_lightning.config.schema import Config, to_tree
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.model.dispatch import Dispatcher
from dsv3_lightning.parallel.strategy import MeshStrategy

OUR_CALLBACKS = Path(__file__).resolve().parents[1].joinpath("callbacks").resolve()  # a top-level folder in a checkout


def check_objects(config: Config) -> None:
    """Checks all settings that name classes or their arguments. Raises ConfigError."""
    Arguments(Trainer, config.trainer, "trainer", skip=("precision", "logger"))
    logger_classes(config)
    build_strategy(config)
    build_callbacks(config)


def build_trainer_arguments(config: Config) -> dict[str, Any]:
    """The `trainer` section as arguments for a Trainer, with class_path blocks built; precision is left as text.

    Loggers are left out: `build_loggers` makes them.
    """
    built = Arguments(Trainer, config.trainer, "trainer", skip=("precision", "logger")).build()
    return {key: built.get(key, value) for key, value in config.trainer.items() if key != "logger"}


def build_loggers(config: Config) -> list[Logger]:
    """The loggers of `trainer.logger`, in addition to the run's own."""
    return [build(LOGGERS, block, path) for path, block, _ in logger_classes(config)]


def logger_classes(config: Config) -> list[tuple[str, dict[str, Any], type]]:
    """Path, block and class of each logger in `trainer.logger`, not instantiated since some open connections.

    Raises ConfigError for one that can't be used, or whose arguments are wrong.
    """
    wanted = config.trainer.get("logger")
    if wanted is False:
        raise ConfigError("trainer.logger=false: the run's own curves are always written; leave the key out")
    if wanted in (None, True, []):
        return []
    found = []
    for number, block in enumerate(wanted if isinstance(wanted, list) else [wanted]):
        path = f"trainer.logger[{number}]" if isinstance(wanted, list) else "trainer.logger"
        cls, arguments, where = named(LOGGERS, block, path)
        check_version(cls, arguments, where)
        Arguments(cls, arguments, where)
        found.append((path, block, cls))
    return found


def build_strategy(config: Config) -> str | Strategy:
    """One of our strategies over a mesh, a Lightning strategy's name, or the object of a class_path block."""
    mesh = mesh_strategy(config.strategy)
    if mesh is not None:
        dispatcher = import_class(mesh.dispatcher, Dispatcher, "strategy.dispatcher")
        return MeshStrategy(**asdict(mesh) | {"dispatcher": dispatcher})
    return build(Strategy, config.strategy, "strategy") if isinstance(config.strategy, dict) else config.strategy


def build_callbacks(config: Config) -> dict[str, Callback]:
    """The callbacks by name, in the order of the YAML; those set to null are left out."""
    built = {}
    for name, block in config.callbacks.items():
        path = f"callbacks.{name}"
        if block is not None and "class_path" in block:
            built[name] = build(Callback, block, path)
        elif block is not None:
            built[name] = getattr(callbacks, CLASSES[name])(**block)
    check_set(built, config.strategy, Path(config.run.dir) / config.run.name)
    check_monitors(built, to_tree(config))
    return built


def build(base: type | tuple[type, ...], block: dict[str, Any], path: str) -> Any:
    """The object of a block {class_path, init_args}. Raises ConfigError."""
    cls, arguments, path = named(base, block, path)
    return Arguments(cls, arguments, path).build()


def named(base: type | tuple[type, ...], block: Any, path: str) -> tuple[type, dict[str, Any], str]:
    """The class of a block {class_path, init_args}, its arguments and their path. Raises ConfigError."""
    check_class_block(block, path)
    cls = import_class(block["class_path"], base, f"{path}.class_path")
    check_class(cls, path)
    return cls, block.get("init_args") or {}, f"{path}.init_args"


def import_class(class_path: str, base: type | tuple[type, ...], path: str) -> type:
    """Imports a subclass of `base` (or a class with its methods), also from modules in the current folder."""
    where, (module, _, name) = f"{path}={show(class_path)}", class_path.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the scripts `dsv3` and `lightning` start without it, `python -m` with it
    if not module:
        raise ConfigError(f"{where}: must be the full name of a class, such as package.module.Class")
    try:
        source = getattr(importlib.import_module(module), "__file__", None) or ""
        found = getattr(sys.modules[module], name)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise ConfigError(f"{where}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        first = base[0] if isinstance(base, tuple) else base
        raise ConfigError(f"{where}: is not a {first.__name__} ({first.__module__})")
    if OUR_CALLBACKS in Path(source).resolve().parents and not module.startswith("dsv3_lightning."):
        raise ConfigError(f"{where}: write dsv3_lightning.{class_path}, or the class exists twice")
    return found
