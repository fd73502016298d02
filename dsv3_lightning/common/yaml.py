"""The YAML dialect of all settings: the core schema of YAML 1.2.2 (§10.3), for files, overrides and stored settings.

`yes`, `on`, `12:30`, `1_000` and dates are text, `010` is 10 and `1e5` is a number. Libraries for YAML 1.1 read the
output of `dumps` the same way, because text is quoted if either dialect would read it as something else.
"""

import re
from collections.abc import Callable
from typing import Any

import yaml
from yaml import MappingNode, Node, ScalarNode, SequenceNode, YAMLError
from yaml.constructor import ConstructorError

from dsv3_lightning.errors import ConfigError

TAG = "tag:yaml.org,2002:"
MOST_NODES = 10_000  # per document, after aliases are expanded
MOST_LEVELS = 100
CORE = {  # tag -> pattern of plain scalars, characters that they start with
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        [*"-+.0123456789"],
    ),
    "merge": (r"<<", ["<"]),  # a YAML 1.1 feature that files rely on
}
Reader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
Writer = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class Loader(Reader):  # type: ignore[misc, valid-type]
    """A loader of plain data only: mappings without repeated keys, lists, text, numbers, true, false and null."""

    yaml_implicit_resolvers: dict = {}
    yaml_constructors: dict = {}

    def get_single_node(self) -> Node | None:
        node = super().get_single_node()
        if node is not None and count_nodes(node) > MOST_NODES:
            raise error(f"more than {MOST_NODES:,} values", node)
        return node


class Dumper(Writer):  # type: ignore[misc, valid-type]
    """A dumper in block style that quotes text that reads as something else and writes out repeated values."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def error(problem: str, node: Node) -> ConstructorError:
    return ConstructorError(None, None, problem, node.start_mark)


def count_nodes(node: Node, above: tuple[Node, ...] = ()) -> int:
    """The number of values below a node, with aliases expanded; stops soon after MOST_NODES. Refuses cycles."""
    if node in above:
        raise error("an alias within its own anchor", node)
    if len(above) > MOST_LEVELS:
        raise error(f"more than {MOST_LEVELS} levels", node)
    total = 1
    parts: list[Node] = []
    if isinstance(node, SequenceNode):
        parts = node.value
    elif isinstance(node, MappingNode):
        parts = [part for pair in node.value for part in pair]
    for part in parts:
        total += 1 if isinstance(part, ScalarNode) else count_nodes(part, (*above, node))
        if total > MOST_NODES:
            break
    return total


def construct_mapping(loader: Any, node: Node) -> dict[Any, Any]:
    """A mapping; duplicate keys are refused, except those that override keys merged by `<<`."""
    if not isinstance(node, MappingNode):
        raise error(f"expected a mapping, not {node.value!r}", node)
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, ScalarNode):
            raise error("a list or mapping can't be a key", key)
        value = loader.construct_object(key)
        if key.tag != f"{TAG}merge" and (type(value), value) in seen:
            raise error(f"found duplicate key {key.value}", key)
        seen.add((type(value), value))
    loader.flatten_mapping(node)
    return {loader.construct_object(key): loader.construct_object(value, deep=True) for key, value in node.value}


def construct_list(loader: Any, node: Node) -> list[Any]:
    if not isinstance(node, SequenceNode):
        raise error(f"expected a list, not {node.value!r}", node)
    return [loader.construct_object(part, deep=True) for part in node.value]


def construct_scalar(name: str, convert: Callable[[str], Any]) -> Callable[[Any, Node], Any]:
    """A constructor for a tag that accepts the same text with an explicit tag (`!!int 1_000`) as without."""

    def construct(loader: Any, node: Node) -> Any:
        text = loader.construct_scalar(node)
        if re.fullmatch(CORE[name][0], text) is None:
            raise error(f"{text!r} is not of the type {name}", node)
        try:
            return convert(text)
        except ValueError:  # Python converts integers of at most 4,300 digits
            raise error(f"the number {text[:20]}… has too many digits", node) from None

    return construct


def read_int(text: str) -> int:
    """
    >>> read_int("010"), read_int("0o10"), read_int("0x10"), read_int("-7")
    (10, 8, 16, -7)
    """
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def read_float(text: str) -> float:
    return float(text.replace(".", "", 1) if text.lstrip("+-")[:2].lower() in (".i", ".n") else text)


def construct_text(loader: Any, node: Node) -> str:
    return loader.construct_scalar(node)


def refuse(loader: Any, node: Node) -> None:
    raise error(f"the tag {node.tag.replace(TAG, '!!')} is not used in settings", node)


for tag, (pattern, first) in CORE.items():
    for yaml_class in (Loader, Dumper):  # the writer also has those of YAML 1.1
        yaml_class.add_implicit_resolver(TAG + tag, re.compile(rf"(?:{pattern})\Z"), first)
for tag, convert in {
    "null": lambda text: None, "bool": lambda text: text.lower() == "true", "int": read_int, "float": read_float,
}.items():  # fmt: skip
    Loader.add_constructor(TAG + tag, construct_scalar(tag, convert))
for tag, constructor in {
    "str": construct_text, "merge": construct_text, "seq": construct_list, "map": construct_mapping,
}.items():  # fmt: skip
    Loader.add_constructor(TAG + tag, constructor)
Loader.add_constructor(None, refuse)


def loads(text: str) -> Any:
    """The value of a YAML text. Raises YAMLError, including for text that can't be encoded as UTF-8."""
    try:
        return yaml.load(text, Loader=Loader)
    except UnicodeEncodeError as wrong:
        raise YAMLError(f"not UTF-8 text (character {wrong.start})") from None


def dumps(tree: Any) -> str:
    """YAML that `loads` reads back as the same dicts, lists, text, numbers, booleans and None. Raises ConfigError."""
    try:
        return yaml.dump(tree, Dumper=Dumper, allow_unicode=True, sort_keys=False, width=2**20)
    except UnicodeEncodeError as wrong:
        raise ConfigError(f"{wrong.object!r}: can't be written as UTF-8 text") from None


def quoted(text: str) -> str:
    """A text as YAML in double quotes on one line."""
    return yaml.dump(text, Dumper=Dumper, allow_unicode=True, default_style='"', width=2**20).rstrip("\n")
