"""Names of checkpoints: they say the step, and of the best ones the validation loss. Imports no torch."""

import math
import re
from pathlib import Path

STEP_FILE = re.compile(r"step=(\d+)\.ckpt")
BEST_FILE = re.compile(r"best-step=(\d+)-loss=(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\.ckpt")  # any finite number


def step_files(folder: Path, until: float = math.inf) -> list[Path]:
    """The checkpoints by step, newest first. until: the last step that counts."""
    found = [(int(match[1]), path) for path in folder.glob("step=*.ckpt") if (match := STEP_FILE.fullmatch(path.name))]
    return [path for step, path in sorted(found, reverse=True) if step <= until]


def best_name(step: int, loss: float) -> str:
    """The name of a best checkpoint, from which `best_files` reads the loss back with four decimals."""
    return f"best-step={step}-loss={loss:.4f}.ckpt"


def best_files(folder: Path) -> list[tuple[float, Path]]:
    """The best checkpoints with their validation losses, lowest first."""
    found = [
        (float(match[2]), path) for path in folder.glob("best-*.ckpt") if (match := BEST_FILE.fullmatch(path.name))
    ]
    return sorted(found)


def resumable_files(folder: Path) -> list[Path]:
    """All checkpoints that a run can go on from, newest first; of two of one step the regular one comes first.

    A best checkpoint holds the whole state, too. The regular one of its step was saved before that step's validation,
    which the next session makes again, so that every callback sees it once.
    """
    best = [path for _, path in best_files(folder)]
    return sorted([*step_files(folder), *best], key=lambda path: (step_in(path), path.name.startswith("step")))[::-1]


def step_in(path: Path) -> int:
    """The step that a checkpoint's name says."""
    match = STEP_FILE.fullmatch(path.name) or BEST_FILE.fullmatch(path.name)
    assert match is not None, f"{path} is not the name of a checkpoint"
    return int(match[1])
