"""Schedules: the learning rate by share of the run's steps; λ, α and the bias speed also by steps or tokens."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.training.config import Phase

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

Schedule = Sequence[Sequence[Any]]
UNITS = ("share", "steps", "tokens")


def lr_factor(step: int, max_steps: int, warmup_steps: int, phases: list[Phase]) -> float:
    """The factor on the peak rate at step number `step` (from 0): warm-up times the current phase's curve.

    V3 §4.2 has linear warm-up, constant, cosine, constant, constant; other papers' schedules are other lists of phases.
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
    """Interpolates from `start` at within = 0 to `end` at 1; `constant` is `end` throughout."""
    if shape == "constant":
        return end
    done = within if shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * within)
    return start + (end - start) * done


def value_at(schedule: Schedule, place: float) -> float:
    """The value at progress `place`, from points [from, value] and [at, value, shape] in rising order.

    A point without a shape is a step: its value holds from there on. With `linear` or `cosine` the value moves to it
    from that of the previous point.

    >>> [value_at([[0.0, 1.0], [0.5, 1.0], [1.0, 0.0, "linear"]], place) for place in (0.25, 0.5, 0.75, 1.0)]
    [1.0, 1.0, 0.5, 0.0]
    """
    begin, value = schedule[0][:2]
    for at, target, *shape in schedule[1:]:
        if at > place:
            return blend(value, target, (place - begin) / (at - begin), shape[0]) if shape else value
        begin, value = at, target
    return value


def progress(trainer: "Trainer", step: int, by: str) -> float:
    """A run's progress after `step` optimizer steps, in the unit of a schedule: share of the run, steps or tokens."""
    if by == "share":
        from dsv3_lightning.training.logging import planned_steps  # settings are checked without torch

        return step / planned_steps(trainer)
    return step if by == "steps" else trainer.datamodule.tokens_before(step)  # type: ignore[attr-defined]


def check_schedule(schedule: Any, by: str, name: str) -> None:
    """Raises ConfigError unless points rise from 0 (to 1 at most, for shares) and values are at least 0."""
    if by not in UNITS:
        raise ConfigError(f"{name.rpartition('.')[0]}.by={by}: must be share, steps or tokens")
    if not isinstance(schedule, list | tuple) or not schedule:
        raise ConfigError(f"{name}={schedule}: must be a list of points [from {by}, value]")
    for point in schedule:
        numbers = isinstance(point, list | tuple) and [type(item) in (int, float) for item in point]
        if numbers not in ([True, True], [True, True, False]) or list(point[2:]) not in ([], ["linear"], ["cosine"]):
            raise ConfigError(
                f"{name}={schedule}: must be a list of points [from {by}, value], or [at {by}, value, linear or cosine]"
            )
    begins = [point[0] for point in schedule]
    if begins[0] != 0 or begins != sorted(set(begins)) or (by == "share" and begins[-1] > 1):
        limit = " to at most 1.0" if by == "share" else ""
        raise ConfigError(f"{name}={schedule}: {by} must rise from 0{limit}")
    if len(schedule[0]) > 2:
        raise ConfigError(
            f"{name}={schedule}: the first point has no earlier point to interpolate from; leave out its shape"
        )
    if any(point[1] < 0 for point in schedule):
        raise ConfigError(f"{name}={schedule}: values must be at least 0")
