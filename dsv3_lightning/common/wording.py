"""How a mistake is put in one line."""

import difflib
import json
from collections.abc import Iterable
from typing import Any

from yaml import YAMLError


def nearest(word: str, valid: Iterable[str], prefix: str = "") -> str:
    """`; did you mean prefix.this?`, or all valid names if none is similar."""
    valid = list(valid)
    close = difflib.get_close_matches(word, valid, 1)
    return f"; did you mean {prefix}{close[0]}?" if close else f"; valid: {', '.join(valid) or 'none'}"


def missing(key: str) -> str:
    """base.yaml has everything but the model's shape, the run's name and length, and callbacks that are off there."""
    known = key.split(".")[0] in ("model", "callbacks")
    return f"{key}: missing" + ("" if known else "; `defaults: [base]` brings the usual settings")


def either(options: Iterable[str]) -> str:
    """`a, b or c`, each once."""
    *most, last = dict.fromkeys(options)
    return f"{', '.join(most)} or {last}" if most else last


def show(value: Any, longest: int = 80) -> str:
    """A value as YAML would have it, on one line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def explain(error: YAMLError) -> str:
    """What a YAML parser found wrong, without the place."""
    return getattr(error, "problem", None) or first_line(error)
