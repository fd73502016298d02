"""A run's failure as one line, with the file that could not be written, or the rank that was lost."""

import errno
import threading
import time
import traceback
from pathlib import Path

from lightning.pytorch import Trainer

from dsv3_lightning.common.files import os_error, reason_of
from dsv3_lightning.errors import ConfigError, RunStopped, WriteError
from dsv3_lightning.parallel.lost import peer_failure

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # what a write fails by, and nothing else


def in_one_line(error: BaseException, folder: Path) -> BaseException:
    """The error to report: the last one of a chain that is meant for users, or the file that could not be written.

    Errors that Lightning raises while it cleans up would hide these.
    """
    step: BaseException | None = error
    while step is not None:
        if isinstance(step, ConfigError | RunStopped):
            return step
        step = step.__cause__ or step.__context__
    failed = os_error(error)
    if failed is not None and of_event_files(failed):
        return WriteError(folder / "events.out.tfevents.*", reason_of(failed))
    if failed is not None and failed.errno in FULL:
        return WriteError(failed.filename or folder, reason_of(failed))
    return error


def of_event_files(error: OSError) -> bool:
    """Whether TensorBoard's writer raised it, whose errors name no file."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__", "").startswith("tensorboard.") for frame, _ in frames)


def hide_event_thread(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread raises what its next call raises in the main thread, too."""
    if not (isinstance(args.exc_value, OSError) and of_event_files(args.exc_value)):
        threading.__excepthook__(args)


def stop_if_another_died(trainer: Trainer, error: BaseException) -> None:
    """Raises RunStopped if another rank's end caused the error, and ends the ranks that this one has started."""
    if isinstance(error, RunStopped):
        return
    watched = getattr(trainer.strategy.launcher, "procs", [])
    started = getattr(trainer.strategy, "lost_ranks", None) or watched.copy()
    watched.clear()  # or their observer kills this process before it has said why
    time.sleep(0.5)  # until it is known what became of them
    lost = peer_failure(error, started)
    if lost is None:
        watched.extend(started)
    else:
        for process in started:
            process.kill()
        who = f"rank {trainer.global_rank} stops"
        raise RunStopped(f"{who}: {lost}; the same command resumes from the newest checkpoint") from error
