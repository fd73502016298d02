"""Logging of scalars: all go to all loggers at an explicit optimizer step, so all curves share an x-axis."""

import math
from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer

SHORT = ("loss/main", "val/loss")  # shown by Lightning's progress bars, which have a single line


def log_scalars(trainer: Trainer, values: Mapping[str, float | None], step: int | None = None) -> None:
    """Logs at `step` (default: optimizer steps done), and stores the latest values.

    EarlyStopping, ModelCheckpoint and tuners read them from `trainer.callback_metrics`. None is a mean over nothing: it
    adds no point to its curve, and `latest_scalars` has no value until the next one.
    """
    present = {name: value for name, value in values.items() if value is not None}
    now = steps_done(trainer) if step is None else step
    for logger in trainer.loggers if present else []:
        logger.log_metrics(present, step=now)
    latest = latest_scalars(trainer)
    vars(trainer.lightning_module).setdefault("scalar_names", set()).update(values)
    for name in values:
        latest.pop(name, None)
    latest.update(present)
    vars(trainer.lightning_module).setdefault("scalar_steps", {}).update(dict.fromkeys(present, now))
    publish(trainer, present)


def publish(trainer: Trainer, values: dict[str, float]) -> None:
    """Stores the values in the Trainer's metric dictionaries, as fp32 on the CPU, where other callbacks read them."""
    tensors = {name: torch.tensor(float(value)) for name, value in values.items()}
    trainer.callback_metrics.update(tensors)
    trainer.logged_metrics.update(tensors)
    trainer.progress_bar_metrics.update({name: float(tensors[name]) for name in SHORT if name in tensors})


def latest_scalars(trainer: Trainer) -> dict[str, float]:
    """The latest value of each scalar, without those that were None when last logged."""
    return vars(trainer.lightning_module).setdefault("scalars", {})


def logged_at(trainer: Trainer, name: str) -> int | None:
    """The step at which a scalar was last logged by `log_scalars`; None if it never was."""
    return vars(trainer.lightning_module).get("scalar_steps", {}).get(name)


def latest_values(trainer: Trainer) -> dict[str, float]:
    """As `latest_scalars`, with what the module logs by `self.log`."""
    ours = vars(trainer.lightning_module).get("scalar_names", set())
    others = {name: float(value) for name, value in trainer.callback_metrics.items() if name not in ours}
    return others | latest_scalars(trainer)


def steps_done(trainer: Trainer) -> int:
    """Optimizer steps of the run so far, also for a finished run that is only validated, where the Trainer has 0."""
    return getattr(trainer.lightning_module, "steps_done", trainer.global_step)


def is_log_step(trainer: Trainer, step: int) -> bool:
    return step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]  # not declared by the Trainer


def is_last_micro_batch(trainer: Trainer, batch_idx: int) -> bool:
    """True for the last micro-batch of an optimizer step, which the end of an epoch may cut short."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


def planned_steps(trainer: Trainer) -> float:
    """Optimizer steps of the whole training: `max_steps`, or those of all epochs; inf where it is unknown."""
    steps = trainer.estimated_stepping_batches
    return math.inf if steps == -1 else steps


def is_due(trainer: Trainer, batch_idx: int, every_n_steps: int) -> bool:
    """True after the steps that an interval names and after the last one, with their last micro-batch."""
    step = trainer.global_step
    return is_last_micro_batch(trainer, batch_idx) and (step % every_n_steps == 0 or step == planned_steps(trainer))
