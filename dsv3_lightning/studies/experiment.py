"""An experiment: a base config, named variants of it, and seeds. Imports no torch."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dsv3_lightning.common.yaml import dumps
from dsv3_lightning.config.compose import PRESETS, Composed, compose, find, read_yaml
from dsv3_lightning.config.overrides import assign, plain
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
    """One run: its name `VARIANT-seedN`, the files it is composed of, the overrides after them, what comes of both."""

    name: str
    files: list[str]
    overrides: list[str]
    config: Config


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
        self.folder = Path(first.tree["run"]["dir"]) / self.path.stem

    def composed_without_run(self) -> Composed:
        return compose(self.files, [*self.overrides, "run.name=check"])

    def tasks(self) -> list[Task]:
        """Writes the variants' settings below the experiment's folder, and checks them. Raises ConfigError."""
        tasks = []
        for variant, changes in self.plan.variants.items():
            if not isinstance(variant, str) or not re.fullmatch(r"[^\W.][\w.+-]*", variant):
                quotes = "" if isinstance(variant, str) else ", in quotes where it reads like a number"
                raise ConfigError(f"{self.path}: variants.{variant}: must be a word that can name a folder{quotes}")
            merged = OmegaConf.merge(self.plan.common, changes or {})
            file, text = self.folder / "variants" / f"{variant}.yaml", dumps(plain(merged))
            if not file.is_file() or file.read_text(encoding="utf-8") != text:  # a finished one may be read-only
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
            for seed in self.plan.seeds:
                name = f"{variant}-seed{seed}"
                own = [assign("run.dir", str(self.folder)), assign("run.name", name), f"run.seed={seed}"]
                own.append(assign("data.cache_dir", str(self.folder.parent / "data")))  # one for all experiments
                tasks.append(self.checked(name, [*self.files, str(file)], [*own, *self.overrides_after()]))
        return tasks

    def checked(self, name: str, files: list[str], overrides: list[str]) -> Task:
        try:
            return Task(name, files, overrides, check(compose(files, overrides).tree))
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {name}: {error}") from None

    def overrides_after(self) -> list[str]:
        """What the command line gave, but for the folder of all runs, which the experiment's lies in."""
        return [override for override in self.overrides if not override.startswith("run.dir=")]


def find_experiment(word: str) -> Path:
    """A file, or the name of an experiment that comes with the package."""
    shipped = Path(str(PRESETS / "experiments"))
    for path in (Path(word), Path(f"{word}.yaml"), shipped / f"{word.removesuffix('.yaml')}.yaml"):
        if path.is_file():
            return path.resolve()
    names = sorted(path.stem for path in shipped.glob("*.yaml"))
    raise ConfigError(f"{word}: no such experiment, neither a file nor one of ours{nearest(Path(word).stem, names)}")
