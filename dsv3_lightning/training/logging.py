"""One way to log: every scalar goes to all loggers at an explicit optimizer step, so that all curves share their x."""

from collections.abc import Mapping

from lightning.pytorch import Trainer


def log_scalars(trainer: Trainer, values: Mapping[str, float | None], step: int | None = None) -> None:
    """Logs at `step` (default: optimizer steps done), and remembers the latest values for the progress line.

    None is a mean over nothing: it has no point in its curve, and no value until there is something again.
    """
    present = {name: value for name, value in values.items() if value is not None}
    for logger in trainer.loggers if present else []:
        logger.log_metrics(present, step=trainer.global_step if step is None else step)
    latest = latest_scalars(trainer)
    for name in values:
        latest.pop(name, None)
    latest.update(present)


def latest_scalars(trainer: Trainer) -> dict[str, float]:
    """The last value of everything that had one when it was last logged."""
    return vars(trainer.lightning_module).setdefault("scalars", {})


def is_log_step(trainer: Trainer, step: int) -> bool:
    return step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]  # the Trainer leaves it undeclared


def stepped(trainer: Trainer, batch_idx: int) -> bool:
    """Whether this micro-batch was the last of its optimizer step. Runs are endless streams: no short last step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0
