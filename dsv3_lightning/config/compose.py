"""Composition of YAML files and overrides into one plain tree.

Everything is merged first and interpolation resolved once at the end, so that `${model.hidden_size}` is the last value
given, whichever file or override it came from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dsv3_lightning.common.paths import user_path
from dsv3_lightning.common.wording import explain, first_line, nearest, show
from dsv3_lightning.common.yaml import dumps, loads
from dsv3_lightning.config.overrides import apply_override, escape_text, plain
from dsv3_lightning.errors import ConfigError

PRESETS = resources.files("dsv3_lightning.configs")


@dataclass(frozen=True)
class Composed:
    """Composed settings. tree: resolved, of dicts, lists and scalars. files: its sources in merge order."""

    tree: dict[str, Any]
    files: list[Path]


def compose(
    files: Sequence[str], overrides: Sequence[str] = (), planned: Mapping[Path, dict[str, Any]] | None = None
) -> Composed:
    """Merges files, each after those in its `defaults:`, then `a.b=value` overrides, left to right.

    A file is a path or a name, with or without .yaml, searched next to the file that names it, then among the presets.
    A file named by several others is merged once, where it is first needed. planned: content of files that follow the
    others and aren't written yet. Raises ConfigError.
    """
    read: dict[Path, dict[str, Any]] = {}
    for name in files:
        gather(find(name, Path()), read)
    merged = OmegaConf.create({})
    for path, tree in (read | dict(planned or {})).items():
        merged = merge(merged, tree, path)
    for override in overrides:
        apply_override(merged, override)
    return Composed(resolve(merged), list(read))


def presets() -> list[str]:
    """Names of the configs that come with the package."""
    return sorted(Path(file.name).stem for file in PRESETS.iterdir() if file.name.endswith(".yaml"))


def find(name: str, folder: Path) -> Path:
    """The file that a name refers to in `folder`. Raises ConfigError."""
    name = str(user_path(name)) if name.startswith("~") else name
    candidates = [folder / name, folder / f"{name}.yaml"]
    if Path(name).name == name:
        candidates.append(Path(str(PRESETS / f"{name.removesuffix('.yaml')}.yaml")))
    for path in candidates:
        try:
            if path.is_file():
                return path.resolve()
        except OSError as error:  # a name that is too long, a folder that can't be read
            raise ConfigError(f"{show(name)}: {error.strerror}") from error
    raise ConfigError(f"{name}: no such file in {folder.resolve()}, nor a preset{nearest(Path(name).stem, presets())}")


def gather(path: Path, read: dict[Path, dict[str, Any]], chain: tuple[Path, ...] = ()) -> None:
    """Reads a file into `read`, after its defaults. Raises ConfigError."""
    if path in chain:
        circle = " -> ".join(step.name for step in (*chain[chain.index(path) :], path))
        raise ConfigError(f"{chain[-1]}: circular defaults: {circle}")
    if path in read:
        return
    tree = read_yaml(path)
    defaults = tree.pop("defaults", [])
    if not isinstance(defaults, list) or not all(isinstance(name, str) for name in defaults):
        raise ConfigError(f"{path}: defaults={defaults}: must be a list of file names, such as [base]")
    for name in defaults:
        gather(find(name, path.parent), read, (*chain, path))
    read[path] = tree


def read_yaml(path: Path) -> dict[str, Any]:
    """A file's top-level mapping, unresolved; UTF-8 in any locale, with or without a byte-order mark."""
    try:
        tree = loads(path.read_text(encoding="utf-8-sig"))
        if tree is None:
            return {}
        if not isinstance(tree, dict):
            found = "a list" if isinstance(tree, list) else show(tree)
            raise ConfigError(f"{path}: must hold sections such as `model:`, not {found}")
        OmegaConf.create(tree)  # every interpolation can be read
        return tree
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(f"{path}{f':{mark.line + 1}' if mark else ''}: {explain(error)}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {first_line(error)}") from error


def merge(merged: DictConfig, tree: dict[str, Any], path: Path) -> DictConfig:
    try:
        return OmegaConf.merge(merged, tree)  # type: ignore[return-value]
    except (OmegaConfBaseException, TypeError) as error:  # a list onto a mapping; OmegaConf doesn't say where
        where = clash(plain(merged), tree, ())
        raise ConfigError(f"{path}: {where}: a list and a mapping can't be merged") from error


def clash(old: Any, new: Any, path: tuple[str, ...]) -> str:
    """Dotted path of the first key that is a list in one tree and a mapping in the other."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = (clash(old[key], new[key], (*path, str(key))) for key in new if key in old)
        return next(filter(None, found), "")
    return ".".join(path) if {type(old), type(new)} == {dict, list} else ""


def resolve(merged: DictConfig) -> dict[str, Any]:
    """The plain tree, with every `${…}` replaced and no `???` left."""
    if key := unset(plain(merged)):
        raise ConfigError(f"{key}: has no value yet (???); set it in a file or as {key}=…")
    try:
        return OmegaConf.to_container(merged, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {first_line(error)}") from error


def unset(node: Any, path: str = "") -> str:
    """Dotted path of the first `???`, or an empty string."""
    if isinstance(node, dict):
        found = (unset(value, f"{path}.{key}".lstrip(".")) for key, value in node.items())
    elif isinstance(node, list):
        found = (unset(value, f"{path}[{i}]") for i, value in enumerate(node))
    else:
        return path if node == "???" else ""
    return next(filter(None, found), "")


def to_yaml(tree: dict[str, Any]) -> str:
    """YAML that composes to the same tree again."""
    return dumps(escape(tree))


def escape(node: Any) -> Any:
    """A resolved tree with every literal `${` escaped, so that it isn't read as interpolation again."""
    if isinstance(node, dict):
        return {key: escape(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [escape(value) for value in node]
    return escape_text(node) if isinstance(node, str) else node
