"""A class's arguments, checked against its signature by jsonargparse, with text kept as text.

jsonargparse reads text as YAML 1.1 wherever a type allows more than text (`"no"` becomes False for `bool | str`,
`"null"` None for `str | None`). Settings have already been parsed, so text is meant as text: it passes the parser
replaced by a placeholder that every YAML dialect reads as text, and the classes get the original.
"""

import re
from collections.abc import Collection, Iterator
from copy import deepcopy
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace, get_loader
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from yaml import YAMLError

from dsv3_lightning.common.wording import nearest, show
from dsv3_lightning.errors import ConfigError

Place = tuple[str | int, ...]  # keys and indices that lead to a value
GUISE = re.compile(r"guised-text-(\d+)")
UNREADABLE = (ArgumentError, TypeError, ValueError)


class Arguments:
    """Arguments for cls, checked without calling it. Raises ConfigError with the key, the value and what is valid."""

    def __init__(self, cls: type, arguments: Any, path: str, skip: Collection[str] = ()) -> None:
        self.path, self.arguments = path, arguments
        self.texts: list[str] = []  # original texts of the placeholders, by number
        self.parser = ArgumentParser(exit_on_error=False)
        self.parser.add_class_arguments(cls, "it", skip=set(skip), fail_untyped=False, instantiate=cls is not Trainer)
        valid = list(vars(self.parser.get_defaults().get("it", Namespace())))
        if not isinstance(arguments, dict):
            raise ConfigError(f"{path}={show(arguments)}: must be a section of arguments{nearest('', valid)}")
        for key in arguments:
            if key not in valid and key not in skip:
                raise ConfigError(f"{path}.{key}: no such argument of {cls.__name__}{nearest(str(key), valid)}")
        given = {key: value for key, value in arguments.items() if key in valid}
        refused: dict[Place, ConfigError] = {}
        for place, text in ambiguous_texts(given):
            try:
                guised = replaced(given, place, f"guised-text-{len(self.texts)}")
                self.texts.append(text)
                self.parse(guised)
                given = guised
            except ConfigError as error:  # no text, or a certain one
                refused[place] = error
        self.parsed = self.parse(given)
        for place, reason in refused.items():
            if type(value_at(self.parsed.it, place)) in (bool, int, float, type(None), list, dict):
                raise reason

    def parse(self, given: dict[str, Any]) -> Namespace:
        try:
            return self.parser.parse_object({"it": deepcopy(given)})  # the parser converts in place
        except UNREADABLE as error:
            raise ConfigError(reword(self.restore(str(error)), self.arguments, self.path)) from error

    def build(self) -> Any:
        """The object, or for the Trainer its arguments. Raises ConfigError, including those of the class."""
        try:
            return self.restore(self.parser.instantiate(self.parsed, instantiators=[(self.call, object, True)]).it)
        except ConfigError:
            raise
        except (ImportError, TypeError, ValueError, MisconfigurationException) as error:
            raise ConfigError(f"{self.path}: {' '.join(str(error).split())}") from error

    def call(self, cls: type, *args: Any, **kwargs: Any) -> Any:
        """Instantiates a class with original texts; called by the parser."""
        kwargs.pop("applied_instantiation_links", None)
        return cls(*self.restore(args), **self.restore(kwargs))

    def restore(self, value: Any) -> Any:
        """A value with placeholders replaced by the original texts; other objects are unchanged."""
        if isinstance(value, str):
            return GUISE.sub(lambda found: self.texts[int(found[1])], value)
        if isinstance(value, Namespace):
            return Namespace(**{key: self.restore(part) for key, part in vars(value).items()})
        if type(value) is dict:
            return {self.restore(key): self.restore(part) for key, part in value.items()}
        return type(value)(self.restore(part) for part in value) if type(value) in (list, tuple, set) else value


def ambiguous_texts(node: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    """Yields texts that jsonargparse may read as something else, each with its location."""
    if isinstance(node, str):
        try:
            if node.strip().isdigit() or not isinstance(get_loader("yaml")(node), str):
                yield place, node
        except YAMLError:
            pass
    for key, part in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from ambiguous_texts(part, (*place, key))


def replaced(node: Any, place: Place, value: Any) -> Any:
    """A copy of dicts and lists with one value changed."""
    if not place:
        return value
    copy = node.copy()
    copy[place[0]] = replaced(node[place[0]], place[1:], value)
    return copy


def value_at(node: Any, place: Place) -> Any:
    """The parser's result at a location; the enclosing value if it has no parts."""
    for key in place:
        if isinstance(node, Namespace):
            node = vars(node).get(str(key), node)
        elif isinstance(node, dict | list | tuple):
            node = node[key]  # type: ignore[index]
    return node


def reword(message: str, arguments: dict[str, Any], path: str) -> str:
    """jsonargparse's multi-line message as one line with our key and value."""
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
