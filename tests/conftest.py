"""Runs of the nano preset on a few of Python's own modules, in this process or in others."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3_lightning.cli import main
from dsv3_lightning.common.history import scalar_history
from tests.forking import Forked

ROOT = Path(__file__).parents[1]
MODULES = (
    "argparse",
    "ast",
    "calendar",
    "configparser",
    "difflib",
    "inspect",
    "optparse",
    "pathlib",
    "tarfile",
    "typing",
)

# A process that a test starts and that dies of a signal then prints the Python stack of each of its threads.
os.environ["PYTHONFAULTHANDLER"] = "1"

# Compiling takes half a minute of a core; tests/training/test_compiling.py has what tests of it need.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

QUIET = ["trainer.precision=32", "trainer.log_every_n_steps=1", "callbacks.throughput.peak_flops=1e11"]

LONGEST = ("parallel", "runs", "examples", "studies")  # folders of tests, by the time that a file of theirs takes

SLOW = ("parallel", "runs", "examples")  # folders of tests of which each trains runs or starts ranks

LAUNCHED = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "RANK", "WORLD_SIZE")


@pytest.fixture(autouse=True)
def launch_environment():
    """A run in this process leaves these behind; a run in another would take them for its launcher's, and wait."""
    forget_launch()  # of a fixture's run
    yield
    forget_launch()


def forget_launch() -> None:
    for name in LAUNCHED:
        os.environ.pop(name, None)


@contextmanager
def blank_figures() -> Iterator[None]:
    """Figures are made, logged and written, but not drawn, which takes more than half of a short run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.draw", lambda figure, renderer: None)
        yield


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`make check` needn't import the folders of which it runs no test."""
    skipped = config.option.markexpr == "not slow" and collection_path in [ROOT / "tests" / name for name in SLOW]
    return True if skipped else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What trains runs or starts ranks is slow, and `make check` leaves it out; other slow tests carry the marker.

    Of several workers none should begin the longest files at the end, so these come first.
    """
    folders = {item: item.path.relative_to(ROOT / "tests").parts[0] for item in items}
    for item, folder in folders.items():
        if "nano" in getattr(item, "fixturenames", ()) or folder in SLOW:
            item.add_marker(pytest.mark.slow)
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: LONGEST.index(folders[item]) if folders[item] in LONGEST else len(LONGEST))


@dataclass
class Run:
    """A run's folder, and how its command ended."""

    folder: Path
    code: int
    output: str = ""

    def scalars(self) -> dict[str, tuple[list[int], list[float]]]:
        return scalar_history(self.folder)

    def report(self) -> dict:
        return json.loads((self.folder / "report.json").read_text())

    def weights(self, step: int) -> dict[str, torch.Tensor]:
        return torch.load(self.folder / f"checkpoints/step={step}.ckpt", weights_only=True)["state_dict"]


@dataclass
class Nano:
    """Starts runs with a common data cache. Everything is fp32, so that runs can be compared."""

    base: Path
    common: list[str]

    def arguments(self, name: str, overrides: tuple[str, ...]) -> list[str]:
        return [
            "run",
            str(ROOT / "configs/nano.yaml"),
            f"run.dir={self.base / 'runs'}",
            f"run.name={name}",
            *self.common,
            *overrides,
        ]

    def run(self, name: str, *overrides: str) -> Run:
        """In this process, which is fast."""
        with blank_figures():
            return Run(self.base / "runs" / name, main(self.arguments(name, overrides)))

    def start(
        self, name: str, *overrides: str, popen: type[subprocess.Popen] = Forked, **environment: str
    ) -> subprocess.Popen[str]:
        """In a process of its own (and its children), which is what a user does. popen: subprocess.Popen for one that
        imports everything itself, as where a locale or an import counts."""
        return popen(
            [sys.executable, "-m", "dsv3_lightning", *self.arguments(name, overrides)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | environment,
            cwd=self.base,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
        )

    def command(self, name: str, *overrides: str, timeout: float = 240, **start: Any) -> Run:
        process = self.start(name, *overrides, **start)
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return Run(self.base / "runs" / name, process.returncode, output)


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The overrides for a small corpus of two origins: ten modules of the standard library."""
    folder, cache = Path(os.__file__).parent, tmp_path_factory.mktemp("cache")
    halves = []
    for modules in (MODULES[:5], MODULES[5:]):
        halves.append(tmp_path_factory.mktemp("corpus"))
        for name in modules:
            (halves[-1] / f"{name}.py").write_bytes((folder / f"{name}.py").read_bytes())
    paths = ",".join(map(str, halves))
    return [f"data.paths=[{paths}]", f"data.cache_dir={cache}", "data.validation_fraction=0.2"]


@pytest.fixture
def nano(tmp_path: Path, data_cache: list[str]) -> Nano:
    torch.set_num_threads(1)
    return Nano(tmp_path, [*data_cache, *QUIET, "callbacks.sample_text=null", "trainer.max_steps=20"])
