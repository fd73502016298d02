"""One way to log: every scalar goes to all loggers at an explicit optimizer step, so that all curves share their x."""

import math
from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer

SHORT = ("loss/main", "val/loss")  # what Lightning's progress bars show, which have one line for all


def log_scalars(trainer: Trainer, values: Mapping[str, float | None], step: int | None = None) -> None:
    """Logs at `step` (default: optimizer steps done), and remembers the latest values.

    EarlyStopping, ModelCheckpoint and tuners find them in `trainer.callback_metrics`. None is a mean over nothing: it
    has no point in its curve, and `latest_scalars` has no value until there is something again.
    """
    present = {name: value for name, value in values.items() if value is not None}
    for logger in trainer.loggers if present else []:
        logger.log_metrics(present, step=steps_done(trainer) if step is None else step)
    latest = latest_scalars(trainer)
    vars(trainer.lightning_module).setdefault("scalar_names", set()).update(values)
    for name in values:
        latest.pop(name, None)
    latest.update(present)
    publish(trainer, present)


def publish(trainer: Trainer, values: dict[str, float]) -> None:
    """Puts the values where other callbacks look for them: fp32, on the CPU, in the Trainer's own dictionaries."""
    tensors = {name: torch.tensor(float(value)) for name, value in values.items()}
    trainer.callback_metrics.update(tensors)
    trainer.logged_metrics.update(tensors)
    trainer.progress_bar_metrics.update({name: float(tensors[name]) for name in SHORT if name in tensors})


def latest_scalars(trainer: Trainer) -> dict[str, float]:
    """The last value of everything that had one when it was last logged."""
    return vars(trainer.lightning_module).setdefault("scalars", {})


def latest_values(trainer: Trainer) -> dict[str, float]:
    """As `latest_scalars`, with what the module logs by `self.log`."""
    ours = vars(trainer.lightning_module).get("scalar_names", set())
    others = {name: float(value) for name, value in trainer.callback_metrics.items() if name not in ours}
    return others | latest_scalars(trainer)


def steps_done(trainer: Trainer) -> int:
    """Optimizer steps of the run so far; to the Trainer a finished run that is only validated has made none."""
    return getattr(trainer.lightning_module, "steps_done", trainer.global_step)


def is_log_step(trainer: Trainer, step: int) -> bool:
    return step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]  # the Trainer leaves it undeclared


def is_last_micro_batch(trainer: Trainer, batch_idx: int) -> bool:
    """Whether an optimizer step follows this micro-batch: it fills the step, or is the last of an epoch."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


def planned_steps(trainer: Trainer) -> float:
    """Optimizer steps of the whole training: `max_steps`, or those of all epochs; inf where it is unknown."""
    steps = trainer.estimated_stepping_batches
    return math.inf if steps == -1 else steps
