"""The words that `run`, `validate`, `prepare` and `plan` share: YAML files, presets and key=value. Imports no torch."""

import argparse
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
    """A checked configuration, the same as plain YAML values, and the files that it was composed of."""

    config: Config
    tree: dict[str, Any]
    files: list[Path]


def arguments(parser: argparse.ArgumentParser, options: str = "") -> None:
    """options: the verb's own flags, for its usage line."""
    parser.usage = f"{parser.prog} FILE... [key=value ...] {options}[--print-config]"
    names = ", ".join(presets())
    parser.add_argument("words", nargs="+", metavar="FILE", help=f"YAML files, or presets by name: {names}")
    parser.add_argument("--print-config", action="store_true", help="show all settings in force, and do nothing")
    parser.epilog = HELP.format(prog=parser.prog, base=PRESETS / "base.yaml")


def read(words: list[str], print_config: bool, mesh: bool = True) -> Settings | None:
    """Composes and checks the settings; None where they were only to be shown. Raises ConfigError.

    mesh: whether the strategy must fit trainer.devices; a plan for another number of GPUs judges it by that.
    """
    files, overrides = split_words(words)
    if not files:
        raise ConfigError("no config named; give a file or a preset, such as laptop")
    composed = compose(files, overrides)
    config = check(composed.tree, mesh=mesh)
    if print_config:
        print(to_yaml(to_tree(config)), end="")
        return None
    return Settings(config, to_tree(config), composed.files)
