"""What changes over a run, as functions of the share of its steps that lie behind: learning rate, λ, bias speed."""

import math

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.training.config import Phase


def lr_factor(step: int, max_steps: int, warmup_steps: int, phases: list[Phase]) -> float:
    """Factor on the peak rate for the step with number `step` (from 0): warm-up times the current phase's curve.

    V3 §4.2 is linear warm-up, constant, cosine, constant, constant; other papers' schedules are other lists of phases.
    """
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    share, start, value = step / max_steps, 0.0, 1.0
    for phase in phases:
        if share < phase.until or phase is phases[-1]:
            within = min(1.0, (share - start) / (phase.until - start))
            return warmup * blend(value, phase.to, within, phase.shape)
        start, value = phase.until, phase.to
    raise AssertionError("unreachable: the last phase ends at 1")


def blend(start: float, end: float, within: float, shape: str) -> float:
    """From `start` at within = 0 to `end` at 1; `constant` is `end` throughout."""
    if shape == "constant":
        return end
    done = within if shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * within)
    return start + (end - start) * done


def staircase(schedule: list[list[float]], share: float) -> float:
    """The value of the last pair [from share, value] that has begun. The first pair begins at 0."""
    return [value for begin, value in schedule if begin <= share][-1]


def check_staircase(schedule: list[list[float]], name: str) -> None:
    """Raises ConfigError unless `schedule` is pairs with shares that rise from 0, and values of at least 0."""
    if not schedule or any(len(pair) != 2 for pair in schedule):
        raise ConfigError(f"{name}={schedule}: must be a list of pairs [from share, value]")
    begins = [begin for begin, _ in schedule]
    if begins[0] != 0 or begins != sorted(set(begins)) or begins[-1] > 1:
        raise ConfigError(f"{name}={schedule}: shares must rise from 0.0 to at most 1.0")
    if any(value < 0 for _, value in schedule):
        raise ConfigError(f"{name}={schedule}: values must be at least 0")
