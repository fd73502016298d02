"""From checked settings to live objects: Trainer arguments, strategy and callbacks, typed by jsonargparse.

The only file here that needs torch; `check_objects` is what `dsv3 validate` adds to `schema.check`.
"""

import importlib
import os
import re
import sys
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import Strategy, StrategyRegistry

from dsv3_lightning.config.checks import mesh_strategy
from dsv3_lightning.config.registry import CALLBACKS
from dsv3_lightning.config.schema import Config
from dsv3_lightning.config.wording import nearest, show
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.model.dispatch import Dispatcher
from dsv3_lightning.parallel.strategy import MeshStrategy

OUR_CALLBACKS = Path(__file__).resolve().parents[1].joinpath("callbacks").resolve()  # a top-level folder in a checkout


def check_objects(config: Config) -> None:
    """Everything that names a class or an argument of one. Raises ConfigError."""
    parse(Trainer, config.trainer, "trainer", skip=("precision",))
    build_strategy(config)
    build_callbacks(config)


def build_trainer_arguments(config: Config) -> dict[str, Any]:
    """The `trainer` section as arguments for a Trainer, with class_path blocks built; precision is left as text."""
    parser, parsed = parse(Trainer, config.trainer, "trainer", skip=("precision",))
    built = instantiate(parser, parsed, "trainer")
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
            built[name] = instantiate(*parse(cls, block, path), path)
    return built


def build(base: type, block: dict[str, Any], path: str) -> Any:
    """The object of a block {class_path, init_args}. Raises ConfigError."""
    if "class_path" not in block:
        raise ConfigError(f"{path}={show(block)}: needs a class_path")
    for key in block:
        if key not in ("class_path", "init_args"):
            raise ConfigError(f"{path}.{key}: not valid beside class_path; arguments stand under init_args")
    cls, path = import_class(block["class_path"], base, f"{path}.class_path"), f"{path}.init_args"
    return instantiate(*parse(cls, block.get("init_args") or {}, path), path)


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


def parse(cls: type, arguments: Any, path: str, skip: Collection[str] = ()) -> tuple[ArgumentParser, Namespace]:
    """Checks arguments against the signature of cls, without calling it."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "it", skip=set(skip), fail_untyped=False, instantiate=cls is not Trainer)
    valid = list(vars(parser.get_defaults().get("it", Namespace())))
    if not isinstance(arguments, dict):
        raise ConfigError(f"{path}={show(arguments)}: must be a section of arguments{nearest('', valid)}")
    for key in arguments:
        if key not in valid and key not in skip:
            raise ConfigError(f"{path}.{key}: no such argument of {cls.__name__}{nearest(str(key), valid)}")
    given = {key: deepcopy(value) for key, value in arguments.items() if key in valid}  # the parser converts in place
    try:
        return parser, parser.parse_object({"it": given})
    except (ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(reword(str(error), arguments, path)) from error


def instantiate(parser: ArgumentParser, parsed: Namespace, path: str) -> Any:
    try:
        return parser.instantiate(parsed).it
    except ConfigError:
        raise
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error


def reword(message: str, arguments: dict[str, Any], path: str) -> str:
    """jsonargparse's message of many lines as one, with our key and value."""
    message = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", message).replace("NoneType", "null")
    message = re.sub(r"(?:typing\.)?Literal\[(.*?)\]", r"\1", message)
    if needed := re.search(r"required: it\.([\w.]+)", message):
        return f"{path}.{needed[1]}: missing"
    found = re.search(r'key "it\.([\w.]+)":\s+(.*)', message, re.DOTALL)
    if found is None:
        return f"{path}: {' '.join(message.split())}"
    key, reason = found[1], " ".join(found[2].split())
    value = arguments.get(key)
    if loaded := re.search(r"Problem with given class_path '\S+': (.*?)(?: - | Given|$)", reason):
        reason = loaded[0].removesuffix(" Given").removesuffix(" - ")
    elif union := re.search(r"Subtypes: \[(.*?)\] Errors:", reason):
        reason = f"must be one of {union[1]}"
    elif single := re.fullmatch(r"Expected an? (.+?)\. Got value: (.*)", reason):
        reason = f"must be {single[1]}" if single[2] == str(value) else reason
    return f"{path}.{key}={show(value)}: {reason}"
