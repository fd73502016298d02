"""Lightning's loop counters after a step, adapted to a changed number of micro-batches per step.

Lightning finds the ends of steps and the validations by counting micro-batches. Where their number per step changes,
in a resumed run or while the batch grows, the counts become those of a run that has had the new number all along.
"""

from typing import Any

from lightning.pytorch import Trainer

Loops = dict[str, Any]


def loops_at(loops: Loops, step: int, micro_batches: int, validate_first: bool) -> Loops:
    """A checkpoint's `loops`, as a run with `micro_batches` per step has them between `step` and the next.

    Its counts of steps remain. A run is a single epoch, so the loop resumes within it.
    validate_first: True if the validation after `step` is still to come; the loop then treats it as interrupted.
    """
    begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    at_end = counts_after(step, micro_batches)
    validation = begun if validate_first else dict.fromkeys(begun, 0)
    fit = loops["fit_loop"] | {
        "epoch_progress": tracked(begun),
        "epoch_loop.batch_progress": tracked(at_end) | {"is_last_batch": False},
        "epoch_loop.val_loop.batch_progress": tracked(validation) | {"is_last_batch": False},
        # The loop adds 1 when it restarts, and another 1 after a validation.
        "epoch_loop.state_dict": {"_batches_that_stepped": step - 1 - validate_first},
    }
    return loops | {"fit_loop": fit}


def set_micro_batches(trainer: Trainer, micro_batches: int, step: int | None = None) -> None:
    """Sets the number of micro-batches per step, and the validations' interval, which Lightning counts in them.

    step: the one that has just ended, in `on_train_batch_end` of its last micro-batch; None before the first.
    """
    if micro_batches == trainer.accumulate_grad_batches:
        return
    assert isinstance(trainer.val_check_batch, int), "the interval of validations is a number of steps"
    interval = trainer.val_check_batch // trainer.accumulate_grad_batches
    trainer.accumulate_grad_batches, trainer.val_check_batch = micro_batches, interval * micro_batches
    if step is None:
        return
    progress = trainer.fit_loop.epoch_loop.batch_progress
    for name, count in counts_after(step, micro_batches).items():
        setattr(progress.total, name, count)
        setattr(progress.current, name, count)


def counts_after(step: int, micro_batches: int) -> dict[str, int]:
    """The counts in `on_train_batch_end` of the step's last micro-batch, which isn't completed yet."""
    done = step * micro_batches
    return {"ready": done, "started": done, "processed": done, "completed": done - 1}


def tracked(counts: dict[str, int]) -> dict[str, dict[str, int]]:
    return {"total": dict(counts), "current": dict(counts)}
