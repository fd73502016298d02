"""Child processes that answer over pipes. Imports no torch."""

import selectors
import subprocess
from typing import IO


def readable_within(pipe: IO[bytes], seconds: float) -> bool:
    """Whether the pipe has bytes to read, or has ended, before so many seconds are over."""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        return bool(selector.select(max(0.0, seconds)))


def end(process: subprocess.Popen[bytes]) -> None:
    """Kills a process, waits for its end, and closes its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
