"""One way to log: every scalar goes to all loggers at an explicit optimizer step, so that all curves share their x."""

from lightning.pytorch import Trainer


def log_scalars(trainer: Trainer, values: dict[str, float], step: int | None = None) -> None:
    """Logs at `step` (default: optimizer steps done), and remembers the latest values for the progress line."""
    for logger in trainer.loggers:
        logger.log_metrics(values, step=steps_done(trainer) if step is None else step)
    latest_scalars(trainer).update(values)


def latest_scalars(trainer: Trainer) -> dict[str, float]:
    """The last value of everything logged so far."""
    return vars(trainer.lightning_module).setdefault("scalars", {})


def steps_done(trainer: Trainer) -> int:
    """Optimizer steps of the run so far; to the Trainer a finished run that is only validated has made none."""
    return getattr(trainer.lightning_module, "steps_done", trainer.global_step)


def is_log_step(trainer: Trainer, step: int) -> bool:
    return step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]  # the Trainer leaves it undeclared


def stepped(trainer: Trainer, batch_idx: int) -> bool:
    """Whether this micro-batch was the last of its optimizer step. Runs are endless streams: no short last step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0
