"""A run's folder: what it says of the run, and its use by one process group at a time. Imports no torch."""

import json
import os
from pathlib import Path
from typing import Any

import filelock

from dsv3_lightning.common.files import remove, remove_leftovers, write_file
from dsv3_lightning.common.json_files import read_json
from dsv3_lightning.common.paths import display_path
from dsv3_lightning.config.compose import to_yaml
from dsv3_lightning.config.schema import Config, check
from dsv3_lightning.config.stored import complete, read_stored
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.parallel.checkpoints.names import remove_unfinished, resumable_files, step_in
from dsv3_lightning.runs.changes import refuse_changes, shown_differences

CONFIG, REPORT, INPUTS, BEGUN_FROM, SET_ASIDE = (
    "config.yaml",
    "report.json",
    "data.json",
    "begun_from.json",
    "set_aside",
)


def stored_config(folder: Path) -> Config:
    """The settings of the run in a folder. Raises ConfigError."""
    file = folder / CONFIG
    if not file.is_file():
        raise ConfigError(f"{file}: missing, so {folder} is not a run's folder")
    tree = read_stored(file)
    try:
        return check(tree)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report of the run in a folder; None until its last step is done. Raises ConfigError."""
    return read_if_there(folder / REPORT)


def read_inputs(folder: Path) -> dict[str, Any] | None:
    """The inputs that a run's data were made from; None if they aren't recorded. Raises ConfigError."""
    return read_if_there(folder / INPUTS)


def read_if_there(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def finished_below(folder: Path) -> list[Path]:
    """The folders of finished runs: this one, or else those directly below it, by name."""
    return [folder] if (folder / REPORT).is_file() else sorted(report.parent for report in folder.glob(f"*/{REPORT}"))


class RunFolder:
    """The folder <run.dir>/<run.name> with config.yaml, sources/, checkpoints/, event files and reports."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.path = Path(config.run.dir) / config.run.name
        self.lock = filelock.FileLock(self.path / ".lock")

    def reopen(self, tree: dict[str, Any]) -> None:
        """Takes an existing run's folder; first rank only. Raises ConfigError if it is in use or of another run."""
        self.take()
        stored = self.stored_tree()
        if stored is not None:
            self.refuse_other(stored, tree)
        for folder in (self.path, self.path / "sources", self.path / "checkpoints"):  # of a session that was killed
            remove_leftovers(folder)
        remove_unfinished(self.path / "checkpoints")

    def create(self, tree: dict[str, Any], sources: list[Path]) -> None:
        """Makes the folder with the run's settings, unless it has been reopened. Raises as `reopen` does."""
        if self.lock.is_locked:
            return
        self.reopen(tree)
        if self.stored_tree() is not None:  # of another process, a moment ago
            return
        for number, source in enumerate(sources):
            write_file(self.path / "sources" / f"{number}_{source.name}", source.read_bytes())
        write_file(self.path / CONFIG, to_yaml(tree))

    def take(self) -> None:
        """Locks the folder, and creates it if needed. Raises ConfigError."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path}: the run's folder can't be created, a file of that name exists")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ConfigError(f"{self.path}: another process is writing this run; choose another run.name") from None
        except OSError as error:
            raise ConfigError(f"{self.path}: the run's folder can't be written ({error.strerror})") from None

    def stored_tree(self) -> dict[str, Any] | None:
        """The resolved configuration of the run in the folder, or None."""
        path = self.path / CONFIG
        return read_stored(path) if path.is_file() else None

    def refuse_other(self, stored: dict[str, Any], tree: dict[str, Any]) -> None:
        compared = self.data_inputs() is not None and not self.finished()
        if differing := shown_differences(stored, tree, compared):
            raise ConfigError(
                f"{self.path}: already holds a run with other settings ({differing}); choose another run.name"
            )
        if self.config.run.resume is False and (resumable_files(self.path / "checkpoints") or self.finished()):
            raise ConfigError(
                f"{self.path}: run.resume=false, but the run exists; choose another run.name or resume=auto"
            )

    def data_inputs(self) -> dict[str, Any] | None:
        """The inputs of the run's own data, or of the run's that it resumes from; None before there are any.

        The run must have the same (data/text/prepare.py), wherever texts and tokenizer are now.
        """
        wanted = self.config.run.resume
        elsewhere = Path(wanted).parent.parent if isinstance(wanted, str) and wanted != "auto" else self.path
        own = read_inputs(self.path)
        return own if own is not None else read_inputs(elsewhere)

    def keep_data(self, prepared: Path) -> None:
        """Copies the tokenizer and the record of the inputs, so that the folder is all that generating needs.

        Raises ConfigError if the folder has another tokenizer, to whose ids the run's weights belong.
        """
        from dsv3_lightning.data.text.store import read_manifest  # loads NumPy

        files = {path.name: path.read_bytes() for path in prepared.glob("tokenizer*.json")}
        files[INPUTS] = json.dumps(read_manifest(prepared)["inputs"], indent=1, ensure_ascii=False).encode()
        there = {name: (self.path / name).read_bytes() for name in files if (self.path / name).is_file()}
        if differing := [name for name in there if there[name] != files[name] and name != INPUTS]:
            raise ConfigError(
                f"{self.path / differing[0]}: differs from the data's in {prepared}; choose another run.name"
            )
        for name in files.keys() - there.keys():
            write_file(self.path / name, files[name])

    def finished(self) -> bool:
        """Whether the run's report shows that its last step is done."""
        report = read_report(self.path)
        return report is not None and report["steps"] >= self.config.trainer["max_steps"]

    def resumes_own(self) -> bool:
        """Whether the run continues from its own checkpoints: run.resume is auto or the path that it began from."""
        wanted, begun = self.config.run.resume, self.begun_from()
        return wanted == "auto" or (begun is not None and begun["path"] == wanted)

    def begun_from(self) -> dict[str, Any] | None:
        """The path in run.resume from which the run began, and its step; None for a run without one."""
        return read_if_there(self.path / BEGUN_FROM)

    def resume_from(self, tree: dict[str, Any]) -> tuple[Path, int] | None:
        """The checkpoint to resume from and its step, or None. The first rank calls it and tells the others.

        A path counts only until the run has a newer checkpoint of its own, from which it then continues. Raises
        ConfigError if the path's checkpoint doesn't exist or differs in settings that may not change.
        """
        from dsv3_lightning.parallel.checkpoints.one_file import (  # sweep and compare load no torch
            made_with,
            newest_good,
            step_of,
        )

        wanted, own = self.config.run.resume, resumable_files(self.path / "checkpoints")
        if wanted is False:
            return None
        if wanted == "auto":
            return newest_good(own)
        begun = self.begun_from() if self.resumes_own() else None
        if begun is not None and (newer := newest_good([path for path in own if step_in(path) > begun["step"]])):
            return newer
        path = Path(wanted)
        if not path.exists():
            raise ConfigError(f"run.resume={wanted}: no such checkpoint")
        if own and begun is None and path.parent.resolve() != own[0].parent.resolve():
            raise ConfigError(
                f"run.resume={wanted}: {self.path} has checkpoints of its own; resume=auto continues from them, "
                "another run.name starts from the path"
            )
        step = step_of(path)
        stored, stateful = made_with(path)
        refuse_changes(wanted, complete(stored), stateful, tree, step, self.data_inputs() is not None)
        return path, step

    def begin(self, start: tuple[Path, int]) -> None:
        """Records the path that the run begins from and sets aside what it has of later steps; first rank only."""
        path, step = start
        if str(path) != self.config.run.resume:
            return
        if set_aside(self.path, step):
            print(f"what the run had made after step {step} is in {display_path(self.path / SET_ASIDE)}", flush=True)
        write_file(self.path / BEGUN_FROM, json.dumps({"path": str(path), "step": step}) + "\n")


def set_aside(folder: Path, step: int) -> bool:
    """Moves a run's checkpoints of later steps, and its report, out of the way. Returns whether there were checkpoints.

    folder: the run's.
    """
    files = folder / "checkpoints"
    later = [file for file in resumable_files(files) if step_in(file) > step]
    for file in [*later, folder / REPORT, folder / "report.md"]:
        if file.exists():
            aside = folder / SET_ASIDE / file.name
            aside.parent.mkdir(exist_ok=True)
            remove(aside)
            os.replace(file, aside)
    if later:
        (files / "last.ckpt").unlink(missing_ok=True)
    return bool(later)
