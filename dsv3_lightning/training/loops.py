"""Where Lightning's training loop stands after a step, whatever the number of micro-batches was when it was saved."""

from typing import Any

Loops = dict[str, Any]


def loops_at(loops: Loops, step: int, micro_batches: int, validate_first: bool) -> Loops:
    """A checkpoint's `loops`, as a run with `micro_batches` per step has them between `step` and the next.

    Lightning counts micro-batches, whose number per step may change between two sessions of a run; what it counts
    in steps stays. A run is one epoch, in which the loop is made to stand.
    validate_first: whether the validation after `step` is yet to be made; the loop then takes it for interrupted.
    """
    done = step * micro_batches
    begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    at_end = {"ready": done, "started": done, "processed": done, "completed": done - 1}  # in on_train_batch_end
    validation = begun if validate_first else dict.fromkeys(begun, 0)
    fit = loops["fit_loop"] | {
        "epoch_progress": tracked(begun),
        "epoch_loop.batch_progress": tracked(at_end) | {"is_last_batch": False},
        "epoch_loop.val_loop.batch_progress": tracked(validation) | {"is_last_batch": False},
        # The loop adds 1 when it starts again, and another 1 after a validation.
        "epoch_loop.state_dict": {"_batches_that_stepped": step - 1 - validate_first},
    }
    return loops | {"fit_loop": fit}


def tracked(counts: dict[str, int]) -> dict[str, dict[str, int]]:
    return {"total": dict(counts), "current": dict(counts)}
