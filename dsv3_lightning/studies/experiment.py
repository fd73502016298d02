"""An experiment: a base config, named variants of it, and seeds. Imports no torch."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dsv3_lightning.common.files import write_file
from dsv3_lightning.common.paths import user_path
from dsv3_lightning.common.yaml import dumps
from dsv3_lightning.config.compose import PRESETS, Composed, compose, find, read_yaml
from dsv3_lightning.config.overrides import plain, text_override
from dsv3_lightning.config.schema import Config, check
from dsv3_lightning.config.typed import build
from dsv3_lightning.config.wording import nearest
from dsv3_lightning.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an experiment's file holds.

    config: files or presets, as `dsv3 run` takes them. common: settings of all variants. variants: by name, what each
    changes. seeds: of every variant. Raises ConfigError.
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
            raise ConfigError(f"seeds={self.seeds}: each once")


@dataclass(frozen=True)
class Task:
    """One run: its name `VARIANT-seedN`, the files it is composed of, the overrides after them, what comes of both.

    variant: the last of the files, which `write_variant` makes. changes: what it holds.
    """

    name: str
    files: list[str]
    variant: Path
    changes: dict[str, Any]
    overrides: list[str]
    config: Config

    def write_variant(self) -> None:
        """The file of the task's variant, where it doesn't hold these settings already."""
        text = dumps(self.changes)
        if not self.variant.is_file() or self.variant.read_text(encoding="utf-8") != text:  # it may be read-only
            write_file(self.variant, text)


class Experiment:
    """Tasks in the order of the file, all seeds of a variant together. Every task's settings are checked at once."""

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
                raise ConfigError(f"{self.path}: variants.{variant}: must be a word that can name a folder")
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
        """What the command line gave, but for the folder of all runs, which the experiment's lies in."""
        return [override for override in self.overrides if not override.startswith("run.dir=")]


def find_experiment(word: str) -> Path:
    """A file, or the name of an experiment that comes with the package."""
    shipped = Path(str(PRESETS / "experiments"))
    for path in (user_path(word), user_path(f"{word}.yaml"), shipped / f"{word.removesuffix('.yaml')}.yaml"):
        if path.is_file():
            return path.resolve()
    names = sorted(path.stem for path in shipped.glob("*.yaml"))
    raise ConfigError(f"{word}: no such experiment, neither a file nor one of ours{nearest(Path(word).stem, names)}")
