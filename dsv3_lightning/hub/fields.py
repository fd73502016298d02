"""Type checks and conversions for fields of config.json. Imports no torch."""

from math import isfinite
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dsv3_lightning.common.json_files import shown, type_name
from dsv3_lightning.errors import ConfigError

LARGEST = 2**53  # largest range in which floats represent all integers
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}


def typed(cls: type, given: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values, converted to the types of the dataclass's fields (4096.0 is a valid int). Raises ConfigError."""
    hints = get_type_hints(cls)
    return {name: fit(value, hints[name], prefix + name) for name, value in given.items()}


def fit(value: Any, hint: Any, name: str) -> Any:
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for option in options:
        if get_origin(option) is Literal and value in get_args(option):
            return value
        if type(value) is option and option in (bool, str, NoneType):
            return value
        if option in (int, float) and type(value) in (int, float) and isfinite(value):
            if abs(value) > LARGEST:
                raise ConfigError(f"{name}={shown(value)}: must be at most 2^53")
            if option is float or float(value).is_integer():
                return option(value)
    words = [
        ", ".join(get_args(option)) if get_origin(option) is Literal else WORDS.get(option, "an object")
        for option in options
    ]
    raise ConfigError(f"{name}={shown(value)}: must be {' or '.join(words)}")


def section(content: dict[str, Any], name: str) -> dict[str, Any]:
    """A field that holds an object; empty if it is null or absent. Raises ConfigError."""
    given = content.get(name)
    if given is not None and not isinstance(given, dict):
        raise ConfigError(f"{name}={shown(given)}: must be an object or null, not {type_name(given)}")
    return dict(given or {})
