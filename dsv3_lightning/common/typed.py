"""Plain trees into typed dataclasses, strictly: unknown keys, missing keys and wrong types are named by dotted path."""

import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from dsv3_lightning.common.wording import either, missing, nearest, show
from dsv3_lightning.errors import ConfigError

T = TypeVar("T")


class WrongType(Exception):
    """A value that isn't of the requested type."""


def build(cls: type[T], tree: Any, path: str = "") -> T:
    """cls(**tree) with every value checked against its annotation. Raises ConfigError, also the dataclass's own."""
    hints = get_type_hints(cls, include_extras=True)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}={show(tree)}: must be a section with the keys {', '.join(hints)}")
    prefix = f"{path}." if path else ""
    for key in tree:
        if key not in hints:
            raise ConfigError(f"{prefix}{key}: no such key{nearest(str(key), hints, prefix)}")
    for field in fields(cls):  # type: ignore[arg-type]
        if field.name not in tree and field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(missing(f"{prefix}{field.name}"))
    return cls(**{key: convert(value, hints[key], prefix + key) for key, value in tree.items()})


def convert(value: Any, hint: Any, path: str) -> Any:
    """The value, converted to the type of its annotation."""
    try:
        return fit(value, hint, path)
    except WrongType:
        quotes = ", in quotes where it reads like a number" if hint is str or get_origin(hint) is Annotated else ""
        raise ConfigError(f"{path}={show(value)}: must be {describe(hint)}{quotes}") from None


def fit(value: Any, hint: Any, path: str) -> Any:
    """Whole numbers are valid as float and 1e1 as int 10; bool, nan and inf are not numbers."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if is_dataclass(hint) and isinstance(value, dict):
        return build(hint, value, path)  # type: ignore[arg-type]
    if origin in (Union, UnionType):
        return fit_one_of(value, args, path)
    if origin is Annotated:
        return fit_annotated(value, args, path)
    if origin is Literal and any(type(value) is type(arg) and value == arg for arg in args):
        return value
    if origin in (list, Sequence) and isinstance(value, list):
        return [convert(item, args[0], f"{path}[{i}]") for i, item in enumerate(value)]
    if origin is tuple and isinstance(value, list) and len(value) == len(args):
        return tuple(convert(item, arg, f"{path}[{i}]") for i, (item, arg) in enumerate(zip(value, args, strict=True)))
    if (origin or hint) is dict and isinstance(value, dict):
        for key in value if args[:1] == (str,) else ():
            if not isinstance(key, str):
                raise ConfigError(f"{path}.{key}: a name must be text, in quotes where it reads like a number")
        return {key: convert(item, args[1], f"{path}.{key}") for key, item in value.items()} if args else value
    if hint is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    if hint is int and (type(value) is int or type(value) is float and value.is_integer()):
        return int(value)
    if hint in (str, bool, NoneType) and type(value) is hint:
        return value
    raise WrongType


def fit_annotated(value: Any, args: tuple[Any, ...], path: str) -> Any:
    """The value as the type says, after the functions that follow it: a path is resolved (common/paths.py)."""
    value = fit(value, args[0], path)
    for read in args[1:]:
        try:
            value = read(value)
        except ConfigError as error:
            raise ConfigError(f"{path}={show(value)}: {error}") from None
    return value


def fit_one_of(value: Any, options: tuple[Any, ...], path: str) -> Any:
    for option in options:
        try:
            return fit(value, option, path)
        except WrongType:
            continue
    raise WrongType


def describe(hint: Any) -> str:
    """An annotation in words."""
    return either(words(hint))


def words(hint: Any) -> list[str]:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return [word for arg in args for word in words(arg)]
    if origin is Annotated:
        return words(args[0])
    if origin is Literal:
        return [show(arg).strip('"') for arg in args]
    if origin in (list, Sequence):
        return ["a list" if args[0] is Any else f"a list, of {describe(args[0])} each"]
    if origin is tuple:
        return [f"a list of {len(args)}: {', '.join(describe(arg) for arg in args)}"]
    if is_dataclass(hint) or (origin or hint) is dict:
        return ["a section"]
    return [{int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}[hint]]
