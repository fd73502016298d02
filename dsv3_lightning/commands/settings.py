"""The arguments shared by `run`, `validate`, `prepare` and `plan`: YAML files, presets, key=value. Imports no torch."""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_lightning.config.compose import PRESETS, compose, presets, to_yaml
from dsv3_lightning.config.overrides import split_words
from dsv3_lightning.config.schema import Config, check, to_tree
from dsv3_lightning.errors import ConfigError

HELP = """\
All intervals (every_n_steps, log_every_n_steps, val_check_interval, warmup_steps) count optimizer steps.
Files are merged in order, overrides last; null removes a callback; ${{section.key}} refers to another setting.
Sections: run, model, data, optimizer, loss, compute, trainer, strategy, callbacks.
Every setting with its meaning and default: {base}

examples:
  {prog} laptop
  {prog} my.yaml optimizer.lr=1e-3 callbacks.sample_text=null trainer.max_steps=50
"""


class Settings(NamedTuple):
    """A checked configuration, the same as plain YAML values, and its source files."""

    config: Config
    tree: dict[str, Any]
    files: list[Path]


def arguments(parser: argparse.ArgumentParser, options: str = "") -> None:
    """Declares the shared arguments. options: the verb's other flags, for the usage line."""
    parser.usage = f"{parser.prog} FILE... [key=value ...] {options}[--print-config]"
    names = ", ".join(presets())
    parser.add_argument("words", nargs="+", metavar="FILE", help=f"YAML files, or presets by name: {names}")
    parser.add_argument("--print-config", action="store_true", help="print all settings in effect and exit")
    parser.epilog = HELP.format(prog=parser.prog, base=PRESETS / "base.yaml")


def command(use: Callable[..., int]) -> Callable[..., int]:
    """A verb's `run`, from a function of the checked settings and the verb's other flags. Raises ConfigError.

    With --print-config it prints the settings instead. With --gpus the strategy needn't fit trainer.devices.
    """

    @functools.wraps(use)
    def run(words: list[str], print_config: bool, **flags: Any) -> int:
        given = read(words, mesh=flags.get("gpus") is None)
        if print_config:
            print(to_yaml(given.tree), end="")
            return 0
        return use(given, **flags)

    return run


def read(words: list[str], mesh: bool = True) -> Settings:
    """Composes and checks the settings. mesh: whether the strategy must fit trainer.devices. Raises ConfigError."""
    files, overrides = split_words(words)
    if not files:
        raise ConfigError("no config named; give a file or a preset, such as laptop")
    composed = compose(files, overrides)
    config = check(composed.tree, mesh=mesh)
    return Settings(config, to_tree(config), composed.files)
