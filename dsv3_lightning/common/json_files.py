"""Reading of text and JSON files from other programs, with one-line errors. Imports no torch."""

import json
from pathlib import Path
from typing import Any

from dsv3_lightning.errors import ConfigError

POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path) -> None:
    """Raises ConfigError for a Git LFS pointer in place of a large file, OSError for a file that can't be opened."""
    with open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise ConfigError(f"{path}: is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises ConfigError."""
    try:
        refuse_pointer(path)
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: can't be read (byte {error.start} is not UTF-8)") from error


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object in a text. Raises ConfigError, which doesn't say where the text is from."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deep
        raise ConfigError(f"not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"not an object but {shown(content)}")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ConfigError."""
    text = read_text(path)
    try:
        return parse_object(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def type_name(value: Any) -> str:
    """The JSON name of a value's type."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def shown(value: Any, most: int = 60) -> str:
    """A value as JSON, shortened if it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else text[:most] + "…"
