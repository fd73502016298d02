"""Command-line overrides: `a.b=value` changes one value of the tree."""

import re
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dsv3_lightning.common.wording import explain, first_line
from dsv3_lightning.common.yaml import loads, quoted
from dsv3_lightning.errors import ConfigError

OVERRIDE = re.compile(r"[^\W\d][\w-]*(\.[\w-]+|\[\d+\])*=")


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits words into (files, overrides): an override begins with a dotted key such as `a.b[1]=`.

    A file with such a name must be given with its folder: ./a=b.yaml
    """
    overrides = [word for word in words if OVERRIDE.match(word)]
    return [word for word in words if not OVERRIDE.match(word)], overrides


def apply_override(merged: DictConfig, override: str) -> None:
    """Sets `a.b=value`, `a.list[1]=value` or `a.list.1=value`; the value is read as YAML. Raises ConfigError."""
    key, _, text = override.partition("=")
    try:
        value = loads(text)
        check_reachable(plain(merged), key)
        OmegaConf.update(merged, key, value, merge=True)
    except YAMLError as error:
        raise ConfigError(f"{override}: not a YAML value ({explain(error)}); for text write {key}='\"…\"'") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{override}: {first_line(error)}") from error


def text_override(key: str, text: str) -> str:
    """The override that sets a key to exactly this text, quoted if it would be read as something else."""
    literal = escape_text(text)
    try:
        plain_text = loads(literal) == literal
    except YAMLError:
        plain_text = False
    return f"{key}={literal if plain_text else quoted(literal)}"


def escape_text(text: str) -> str:
    r"""Text with its `${` and `???` escaped, so that they stay literal.

    >>> print(escape_text("${x}"), escape_text(r"\${x}"), escape_text("???"))
    \${x} \\\${x} \???
    """
    if re.fullmatch(r"\\*\?\?\?", text):  # alone it means a missing value
        return f"\\{text}"
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # backslashes count in pairs before an interpolation


def check_reachable(tree: Any, key: str) -> None:
    """Raises ConfigError for a missing list index or a key inside a scalar, both of which OmegaConf makes a mapping."""
    node, path = tree, ""
    for part in re.findall(r"[^.\[\]]+", key):
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                raise ConfigError(f"{key}: {path} has {len(node)} elements, counted from 0; there is no {part}")
            node, path = node[int(part)], f"{path}[{part}]"
        elif isinstance(node, bool | int | float):
            raise ConfigError(f"{key}: {path}={node} is one value; it has no {part}")
        else:
            node, path = node.get(part) if isinstance(node, dict) else None, f"{path}.{part}".lstrip(".")


def plain(tree: Any) -> Any:
    """The tree as dicts and lists, unresolved."""
    return OmegaConf.to_container(tree, resolve=False)
