"""Parsing of JSON objects by tables of field names and handlers.

A handler takes the field's name and value and returns the parsed value; it raises Refused for a value that can't be
honored. A field that is in no table might change the answer, so it is refused by name and never ignored. Null counts as
an absent field, as in OpenAI's schema.
"""

import difflib
import json
from collections.abc import Callable, Mapping
from typing import Any

from dsv3_lightning.inference.server.refusals import Refused

Handler = Callable[[str, Any], Any]
SHOWN = 60  # characters of a value in a message
STOPS, STOP_LENGTH = 16, 1_000  # limits, since the decoding thread searches for them at every token


def read_fields(
    content: Any, table: Mapping[str, Handler], required: tuple[str, ...], where: str = ""
) -> dict[str, Any]:
    """The parsed fields, by name, in the table's order. where: the prefix of field names in messages, such as
    `messages.0.`. Raises Refused."""
    if not isinstance(content, dict):
        raise wrong(where.rstrip(".") or "the body", content, "must be a JSON object")
    given = {name: value for name, value in content.items() if value is not None}
    found = {name: read(f"{where}{name}", given.pop(name)) for name, read in table.items() if name in given}
    for name in given:
        near = difflib.get_close_matches(name, table, 1, cutoff=0.8)
        meant = f"did you mean {near[0]}?" if near else "leave it out"
        raise Refused(400, f"{where}{cut(name)}: is not supported here; {meant}", param=f"{where}{cut(name)}")
    for name in required:
        if name not in found:
            raise Refused(400, f"{where}{name}: is missing", param=f"{where}{name}")
    return found


def only(*neutral: Any) -> Handler:
    """A handler for an unsupported field, which accepts only values that change nothing."""

    def read(name: str, value: Any) -> None:
        if not any(alike(value, one) for one in neutral):
            given = ", or give " + " or ".join(json.dumps(one) for one in neutral) if neutral else ""
            raise wrong(name, value, f"is not supported here; leave it out{given}")

    return read


def alike(value: Any, neutral: Any) -> bool:
    """True if value and type are equal: 0 == False, but logprobs=0 requests log-probabilities from /v1/completions."""
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


def anything(name: str, value: Any) -> None:
    """Handler for fields that never change the answer, such as user, caching and priority."""


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong(name, value, "must be text")
    return value


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong(name, value, "must be true or false")
    return value


def number(name: str, value: Any) -> float:
    """Handler for finite numbers; Sampling checks their range."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not -1e300 < value < 1e300:
        raise wrong(name, value, "must be a number")
    return float(value)


def whole(least: int, most: int) -> Handler:
    """A handler for integers in a range; 16.0 is valid, since some languages have only floats."""

    def read(name: str, value: Any) -> int:
        is_whole = isinstance(value, int) or isinstance(value, float) and value.is_integer()
        if isinstance(value, bool) or not is_whole or not least <= value <= most:
            raise wrong(name, value, f"must be a whole number from {least} to {most}")
        return int(value)

    return read


def token_ids(name: str, value: Any) -> list[int]:
    """Handler for a list of token ids; the model's vocabulary is checked later."""
    if not isinstance(value, list) or not all(map(is_token, value)):
        raise wrong(name, value, "must be a list of token ids")
    return value


def is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def stop_strings(name: str, value: Any) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list) or not all(isinstance(word, str) for word in given):
        raise wrong(name, value, "must be text, or a list of texts")
    if len(given) > STOPS or any(len(word) > STOP_LENGTH for word in given):
        raise wrong(name, value, f"must be at most {STOPS} texts of at most {STOP_LENGTH:,} characters")
    return tuple(given)


def record(table: Mapping[str, Handler]) -> Handler:
    """A handler for a nested object."""
    return lambda name, value: read_fields(value, table, (), f"{name}.")


def wrong(name: str, value: Any, reason: str) -> Refused:
    return Refused(400, f"{name}={cut(json.dumps(value, ensure_ascii=False))}: {reason}", param=name)


def cut(shown: str) -> str:
    return shown if len(shown) <= SHOWN else shown[:SHOWN] + "…"
