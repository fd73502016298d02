"""The run's folder: made once, never overwritten, used by one process group at a time."""

import json
from pathlib import Path
from typing import Any

import filelock

from dsv3_lightning.common.files import write_file
from dsv3_lightning.config.compose import to_yaml
from dsv3_lightning.config.schema import Config
from dsv3_lightning.config.stored import read_stored
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.parallel.checkpoints.names import step_files

# What may differ when a run goes on: it changes where and how fast, not what is computed.
FREE = (
    "run.resume run.dir data.cache_dir data.num_workers trainer.devices trainer.num_nodes trainer.accelerator "
    "trainer.accumulate_grad_batches strategy"
).split()


class RunFolder:
    """<run.dir>/<run.name> with config.yaml, sources/, checkpoints/, event files and reports."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.path = Path(config.run.dir) / config.run.name
        self.lock = filelock.FileLock(self.path / ".lock")

    def claim(self, tree: dict[str, Any], sources: list[Path]) -> None:
        """Creates or re-enters the folder; first rank only. Raises ConfigError if it is in use, or another run's."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path}: the run's folder can't be made, a file of that name is in its place")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ConfigError(f"{self.path}: another process is writing this run; choose another run.name") from None
        except OSError as error:
            raise ConfigError(f"{self.path}: the run's folder can't be written ({error.strerror})") from None
        stored = self.stored_tree()
        if stored is not None:
            self.refuse_other(stored, tree)
            return
        for number, source in enumerate(sources):
            write_file(self.path / "sources" / f"{number}_{source.name}", source.read_bytes())
        write_file(self.path / "config.yaml", to_yaml(tree))

    def stored_tree(self) -> dict[str, Any] | None:
        """The resolved configuration that the folder was made with."""
        path = self.path / "config.yaml"
        return read_stored(path) if path.is_file() else None

    def refuse_other(self, stored: dict[str, Any], tree: dict[str, Any]) -> None:
        if differing := shown_differences(stored, tree):
            raise ConfigError(f"{self.path}: a run with other settings is there ({differing}); choose another run.name")
        if self.config.run.resume is False and (step_files(self.path / "checkpoints") or self.finished()):
            raise ConfigError(
                f"{self.path}: run.resume=false, but the run exists; choose another run.name or resume=auto"
            )

    def finished(self) -> bool:
        """Whether the run's report says that its last step is done."""
        path = self.path / "report.json"
        if not path.is_file():
            return False
        return json.loads(path.read_text(encoding="utf-8"))["steps"] >= self.config.trainer["max_steps"]

    def resume_from(self) -> tuple[Path, int] | None:
        """The checkpoint to go on from and its step. The same on every rank: a function of the files alone."""
        from dsv3_lightning.parallel.checkpoints.one_file import newest_good, step_of  # sweep and compare load no torch

        wanted = self.config.run.resume
        if isinstance(wanted, str) and wanted != "auto":
            if not Path(wanted).exists():
                raise ConfigError(f"run.resume={wanted}: there is no such checkpoint")
            return Path(wanted), step_of(Path(wanted))
        return newest_good(step_files(self.path / "checkpoints")) if wanted == "auto" else None


def shown_differences(stored: dict[str, Any], tree: dict[str, Any]) -> str:
    """The first few, in words; empty where there is none."""
    differing = differences(stored, tree)
    shown = "; ".join(f"{key}: {old!r} there, {new!r} here" for key, (old, new) in list(differing.items())[:4])
    return f"{shown} and {len(differing) - 4} more" if len(differing) > 4 else shown


def differences(old: Any, new: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """{dotted key: (old, new)} for every leaf that differs and may not. `trainer.precision: auto` fits any choice."""
    if key in FREE or old == new or (key == "trainer.precision" and new == "auto"):
        return {}
    if isinstance(old, dict) and isinstance(new, dict):
        return {
            path: pair
            for name in [*old, *(name for name in new if name not in old)]
            for path, pair in differences(old.get(name), new.get(name), f"{key}.{name}".lstrip(".")).items()
        }
    return {key: (old, new)}
