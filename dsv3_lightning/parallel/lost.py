"""One line for what a rank sees when another rank dies or hangs."""

import signal
import subprocess
from collections.abc import Sequence

import torch.distributed as dist

CLOSED = ("gloo", "Connection closed by peer", "Connection reset by peer", "caused pair closure")
# NCCL's watchdog ends the process itself, unless TORCH_NCCL_BLOCKING_WAIT=1 or a communicator is just being made. Of
# the errors that Python sees then, these are caused by this rank or by the program, not by another rank.
OWN_NCCL = ("ncclUnhandledCudaError", "ncclInternalError", "ncclInvalidArgument", "ncclInvalidUsage")


def peer_failure(error: BaseException, started: Sequence[subprocess.Popen]) -> str | None:
    """What happened to another rank, if that caused the error; None for any other error.

    started: the processes that this one has started, ranks 1, 2, ...
    """
    text = " ".join(str(error).split())
    late = any(sign in text.lower() for sign in ("timed out", "timeout"))
    if not (isinstance(error, dist.DistError) or any(sign in text for sign in CLOSED)):
        return None
    if any(sign in text for sign in OWN_NCCL):
        return None
    ended = [(rank, code) for rank, process in enumerate(started, start=1) if (code := process.poll())]
    for rank, code in sorted(ended, key=lambda one: one[1] > 0):  # ranks that miss the killed one end by themselves
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"rank {rank} is gone ({how})"
    limit = "strategy.timeout_minutes (step_timeout_minutes after the first step)"
    return f"another rank did not answer within {limit}" if late else "another rank is gone"
