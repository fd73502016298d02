"""What a rank sees when another one dies or hangs, told in one line."""

import signal
import subprocess
from collections.abc import Sequence

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

# What may reach a run's main thread: a collective's failure, or that of a checkpoint written in the background.
ERRORS = (RuntimeError, CheckpointException)


def lost_contact(error: BaseException) -> str | None:
    """What broke, if it is the connection to another rank; None for any other error."""
    text = " ".join(str(error).split())
    if "Timed out" in text or "timeout" in text.lower() and isinstance(error, dist.DistError):
        return "it did not answer within strategy.timeout_minutes"
    gloo = "gloo" in text or any(sign in text for sign in ("Connection closed by peer", "Connection reset by peer"))
    return "its connection is closed" if gloo or isinstance(error, dist.DistError) else None


def who_is_gone(started: Sequence[subprocess.Popen]) -> str:
    """Of the processes that this one started (ranks 1, 2, ...) the first that ended badly, and how; or another rank."""
    for rank, process in enumerate(started, start=1):
        if code := process.poll():
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            return f"rank {rank} is gone ({how})"
    return "another rank is gone"
