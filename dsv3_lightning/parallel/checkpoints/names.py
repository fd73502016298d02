"""Names of checkpoints: they say the step, and of the best ones the validation loss. Imports no torch."""

import math
import re
from pathlib import Path

STEP_FILE = re.compile(r"step=(\d+)\.ckpt")
BEST_FILE = re.compile(r"best-step=(\d+)-loss=([\d.]+)\.ckpt")


def step_files(folder: Path, until: float = math.inf) -> list[Path]:
    """The checkpoints by step, newest first. until: the last step that counts."""
    found = [(int(match[1]), path) for path in folder.glob("step=*.ckpt") if (match := STEP_FILE.fullmatch(path.name))]
    return [path for step, path in sorted(found, reverse=True) if step <= until]


def best_files(folder: Path) -> list[tuple[float, Path]]:
    """The best checkpoints with their validation losses, lowest first."""
    found = [
        (float(match[2]), path) for path in folder.glob("best-*.ckpt") if (match := BEST_FILE.fullmatch(path.name))
    ]
    return sorted(found)
