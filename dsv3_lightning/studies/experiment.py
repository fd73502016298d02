"""An experiment: a base config, named variants of it, and seeds. Imports no torch."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dsv3_lightning.common.files import write_file
from dsv3_lightning.common.paths import user_path
from dsv3_lightning.common.typed import build
from dsv3_lightning.common.wording import nearest
from dsv3_lightning.common.yaml import dumps
from dsv3_lightning.config.compose import PRESETS, Composed, compose, find, read_yaml
from dsv3_lightning.config.overrides import plain, text_override
from dsv3_lightning.config.schema import Config, check
from dsv3_lightning.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The content of an experiment's file.

    config: files or presets, as for `dsv3 run`. common: settings of all variants. variants: {name: changed settings}.
    seeds: those of every variant. Raises ConfigError.
    """

    config: list[str]
    common: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    seeds: list[int]

    def __post_init__(self) -> None:
        for name in ("config", "variants", "seeds"):
            if not getattr(self, name):
                raise ConfigError(f"{name}: must not be empty")
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds={self.seeds}: must not repeat a seed")


@dataclass(frozen=True)
class Task:
    """One run: its name `VARIANT-seedN`, its source files, the overrides, and the resulting settings.

    variant: the last of the files, written by `write_variant`. changes: its content.
    """

    name: str
    files: list[str]
    variant: Path
    changes: dict[str, Any]
    overrides: list[str]
    config: Config

    def write_variant(self) -> None:
        """Writes the file of the task's variant unless it already has these settings."""
        text = dumps(self.changes)
        if not self.variant.is_file() or self.variant.read_text(encoding="utf-8") != text:  # it may be read-only
            write_file(self.variant, text)


class Experiment:
    """An experiment with its tasks in file order, seeds of a variant together. All settings are checked up front."""

    def __init__(self, word: str, overrides: list[str]) -> None:
        self.path = find_experiment(word)
        tree = read_yaml(self.path)
        try:
            self.plan = build(Plan, {"common": {}, **tree})
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from None
        self.overrides = overrides
        self.files = [str(find(name, self.path.parent)) for name in self.plan.config]
        first = self.composed_without_run()
        self.folder = user_path(str(first.tree["run"]["dir"])) / self.path.stem

    def composed_without_run(self) -> Composed:
        return compose(self.files, [*self.overrides, "run.name=check"])

    def tasks(self) -> list[Task]:
        """Every run, its settings checked; nothing is written. Raises ConfigError."""
        tasks = []
        for variant, changes in self.plan.variants.items():
            if not re.fullmatch(r"[^\W.][\w.+-]*", variant):
                raise ConfigError(f"{self.path}: variants.{variant}: must be usable as a folder's name")
            merged = plain(OmegaConf.merge(self.plan.common, changes or {}))
            file = self.folder / "variants" / f"{variant}.yaml"
            for seed in self.plan.seeds:
                name = f"{variant}-seed{seed}"
                own = [text_override("run.dir", str(self.folder)), f"run.name={name}", f"run.seed={seed}"]
                own.append(text_override("data.cache_dir", str(self.folder.parent / "data")))  # one for all experiments
                tasks.append(self.checked(name, file, merged, [*own, *self.overrides_after()]))
        return tasks

    def checked(self, name: str, variant: Path, changes: dict[str, Any], overrides: list[str]) -> Task:
        try:
            config = check(compose(self.files, overrides, {variant: changes}).tree)
            return Task(name, [*self.files, str(variant)], variant, changes, overrides, config)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {name}: {error}") from None

    def overrides_after(self) -> list[str]:
        """The overrides of the command line, except the folder of all runs, which contains the experiment's folder."""
        return [override for override in self.overrides if not override.startswith("run.dir=")]


def find_experiment(word: str) -> Path:
    """The path of an experiment, given as a file or as the name of one in the package. Raises ConfigError."""
    shipped = Path(str(PRESETS / "experiments"))
    for path in (user_path(word), user_path(f"{word}.yaml"), shipped / f"{word.removesuffix('.yaml')}.yaml"):
        if path.is_file():
            return path.resolve()
    names = sorted(path.stem for path in shipped.glob("*.yaml"))
    raise ConfigError(f"{word}: no such experiment: neither a file nor a shipped one{nearest(Path(word).stem, names)}")
