"""Names of checkpoints, which hold the step and, for the best ones, the value they are best by. Imports no torch."""

import math
import re
from pathlib import Path

from dsv3_lightning.common.files import BESIDE, OLD, remove

SHARDS, REST = "shards", "rest.pt"  # in the folder of a sharded checkpoint
STEP_FILE = re.compile(r"step=(\d+)\.ckpt")
LOSS = "loss"  # in the name of a best checkpoint: the lowest validation loss; or the lowest or highest of another value
BEST_FILE = re.compile(r"best-step=(\d+)-(loss|lowest|highest)=(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\.ckpt")


def step_files(folder: Path, until: float = math.inf) -> list[Path]:
    """The regular checkpoints, newest first. until: the last step to include."""
    found = [(int(match[1]), path) for path in folder.glob("step=*.ckpt") if (match := STEP_FILE.fullmatch(path.name))]
    return [path for step, path in sorted(found, reverse=True) if step <= until]


def best_name(step: int, value: float, kind: str = LOSS) -> str:
    """The name of a best checkpoint, from which `best_files` reads the value back: a loss with four decimals, another
    one with nine digits. kind: loss, lowest or highest."""
    return f"best-step={step}-{kind}={value:{'.4f' if kind == LOSS else '.9g'}}.ckpt"


def best_files(folder: Path, kind: str | None = None) -> list[tuple[float, Path]]:
    """The best checkpoints with their values, best first. kind: as in `best_name`; None: all."""
    matches = [(BEST_FILE.fullmatch(path.name), path) for path in folder.glob("best-*.ckpt")]
    found = [(m[2], float(m[3]), path) for m, path in matches if m is not None and kind in (None, m[2])]
    return [
        (value, path) for _, value, path in sorted(found, key=lambda one: -one[1] if one[0] == "highest" else one[1])
    ]


def resumable_files(folder: Path) -> list[Path]:
    """All checkpoints that a run can resume from, newest first; at equal steps the regular one comes first.

    A best checkpoint holds the full state, too. The regular one of the same step was saved before that step's
    validation; the resumed run repeats it, so every callback sees it once.
    """
    best = [path for _, path in best_files(folder)]
    return sorted([*step_files(folder), *best], key=lambda path: (step_in(path), path.name.startswith("step")))[::-1]


def step_in(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = STEP_FILE.fullmatch(path.name) or BEST_FILE.fullmatch(path.name)
    assert match is not None, f"{path} is not the name of a checkpoint"
    return int(match[1])


def remove_unfinished(folder: Path) -> None:
    """Removes checkpoints that a run which was killed has not finished, or had moved out of the way."""
    for pattern in (f"*.ckpt{BESIDE}", f"*.ckpt{OLD}"):
        for path in folder.glob(pattern):
            remove(path)
