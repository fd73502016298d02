"""Resolution of paths from users: flags have `type=path_argument`, settings the type `PathText`.

`~` and `~NAME` are home folders; all other paths are relative to the working folder, even in a YAML file (only files in
`defaults:` are searched next to the file that names them). Links are not resolved. Environment variables are not
expanded; YAML has `${oc.env:NAME}` for that. Imports no torch.
"""

import argparse
import os
from pathlib import Path
from typing import Annotated, Any

from dsv3_lightning.errors import ConfigError

NAME_BYTES, PATH_BYTES = 255, 4095  # the most that file systems and Linux take


def user_path(given: str | Path) -> Path:
    """The absolute path for a user's text; an absolute path is unchanged.

    The name's bytes on disk are UTF-8, also where Python would encode names as ASCII (LC_ALL=C without UTF-8 mode).
    Raises ConfigError for an empty path, a home folder that isn't known, a NUL byte, and what is too long for a path.
    """
    text = os.fspath(given)
    if not text.strip():
        raise ConfigError("a path must not be empty; . is the current folder")
    if "\0" in text:
        raise ConfigError(f"{text!r} can't be a path: it holds a NUL byte")
    text = os.path.expanduser(os.fsdecode(text.encode("utf-8", "surrogateescape")))
    if text.startswith("~"):
        raise ConfigError(f"{text}: there is no home folder for {text.split('/')[0]}; ./{text} is a folder here")
    path = Path(text).absolute()
    if len(os.fsencode(path)) > PATH_BYTES or any(len(os.fsencode(part)) > NAME_BYTES for part in path.parts):
        limits = f"a name has at most {NAME_BYTES} bytes, a path {PATH_BYTES:,}"
        raise ConfigError(f"{text[:40]!r}... is too long for a path: {limits}")
    return path.resolve() if ".." in path.parts else path  # the parent of a link is that of its target


def path_argument(text: str) -> Path:
    """The argparse type of all paths."""
    try:
        return user_path(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def path_text(text: str) -> str:
    """The absolute path as text, as stored in records of settings."""
    return str(user_path(text))


# A setting that is a path: config/typed.py applies what follows the type.
PathText = Annotated[str, path_text]


def display_path(path: str | Path) -> str:
    """The path for messages: relative to the working folder if it is inside."""
    path = Path(path)
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) and path != here else str(path)


def expand_home(tree: Any, inside: bool = False) -> Any:
    """A copy of a tree of settings with every text in `init_args` that begins with `~/` resolved.

    Those are arguments of users' classes, whose types don't show which are paths.
    """
    if isinstance(tree, dict):
        return {key: expand_home(value, inside or key == "init_args") for key, value in tree.items()}
    if isinstance(tree, list):
        return [expand_home(value, inside) for value in tree]
    return path_text(tree) if inside and isinstance(tree, str) and tree.startswith("~/") else tree
