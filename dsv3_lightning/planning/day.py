"""The time in a day that isn't training: validation, saving, and failures.

Failures come at a rate per GPU. Each loses half an interval between checkpoints, the time a checkpoint takes to reach
the disk, and a restart.
"""

from dataclasses import dataclass
from typing import NamedTuple

from dsv3_lightning.planning.coefficients import TABLE

DAY = 86400.0
WARN = 0.02  # of a day
COEFFICIENTS = ("disk.write", "disk.total", "save.pause", "failures", "restart")


@dataclass(frozen=True)
class Schedule:
    """What interrupts a run. validate_every, save_every: seconds of training. batches: of one validation.

    state: bytes of a checkpoint. kept: how many are on the disk. sharded: ranks write in the background, else one rank
    writes everything while all wait.
    """

    validate_every: float
    batches: float
    save_every: float
    state: float
    kept: int
    sharded: bool


class Loss(NamedTuple):
    """A share of the time, by cause. seconds: of one occurrence. every: seconds between two."""

    name: str
    share: float
    seconds: float
    every: float


def losses(schedule: Schedule, step: float, gpus: int, per_node: int) -> list[Loss]:
    """The time that validation, saving and failures take. step: seconds of an optimizer step.

    A batch of validation counts as a third of a step, which is the forward pass's share of the FLOP.
    """
    validation = schedule.batches * step / 3
    writing = write_seconds(schedule, gpus, per_node)
    pause = schedule.state / gpus / value("save.pause") if schedule.sharded else writing
    between = DAY / (gpus * value("failures"))
    lost = value("restart") + schedule.save_every / 2 + writing
    return [
        Loss("validation", share(validation, schedule.validate_every), validation, schedule.validate_every),
        Loss("waiting for checkpoints", share(pause, schedule.save_every), pause, schedule.save_every),
        Loss("failures: work done again, and restarts", min(1.0, lost / between), lost, between),
    ]


def write_seconds(schedule: Schedule, gpus: int, per_node: int) -> float:
    """Seconds until a checkpoint is on the disk."""
    writers = -(-gpus // per_node) if schedule.sharded else 1
    return schedule.state / min(writers * value("disk.write"), value("disk.total"))


def share(seconds: float, every: float) -> float:
    """The share of the time of something that takes `seconds` after every `every` seconds of training."""
    return seconds / (seconds + every) if seconds else 0.0


def value(name: str) -> float:
    return TABLE[name].values["all"]


def warnings(found: list[Loss], schedule: Schedule, gpus: int, per_node: int) -> list[str]:
    """A line for each loss above 2 % of a day, and one if checkpoints take longer to write than they are apart."""
    lines = [f"WARNING: {loss.name}: {loss.share:.1%} of the time" for loss in found if loss.share > WARN]
    writing = write_seconds(schedule, gpus, per_node)
    if writing > schedule.save_every:
        every = schedule.save_every / 60
        lines.append(f"WARNING: writing a checkpoint takes {writing / 60:.0f} min, and one is due every {every:.0f}")
    return lines
