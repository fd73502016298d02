"""Lightning's loop counters after a step, adapted to a changed number of micro-batches per step."""

from typing import Any

Loops = dict[str, Any]


def loops_at(loops: Loops, step: int, micro_batches: int, validate_first: bool) -> Loops:
    """A checkpoint's `loops`, as a run with `micro_batches` per step has them between `step` and the next.

    Lightning counts micro-batches, whose number per step may change when a run is resumed; its counts of steps remain.
    A run is a single epoch, so the loop resumes within it.
    validate_first: True if the validation after `step` is still to come; the loop then treats it as interrupted.
    """
    done = step * micro_batches
    begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    at_end = {"ready": done, "started": done, "processed": done, "completed": done - 1}  # in on_train_batch_end
    validation = begun if validate_first else dict.fromkeys(begun, 0)
    fit = loops["fit_loop"] | {
        "epoch_progress": tracked(begun),
        "epoch_loop.batch_progress": tracked(at_end) | {"is_last_batch": False},
        "epoch_loop.val_loop.batch_progress": tracked(validation) | {"is_last_batch": False},
        # The loop adds 1 when it restarts, and another 1 after a validation.
        "epoch_loop.state_dict": {"_batches_that_stepped": step - 1 - validate_first},
    }
    return loops | {"fit_loop": fit}


def tracked(counts: dict[str, int]) -> dict[str, dict[str, int]]:
    return {"total": dict(counts), "current": dict(counts)}
