"""Progress of long work on stderr: a bar with the time left on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress(label: str, total_bytes: int | None, every_seconds: float = 10.0) -> Iterator[Callable[[int], None]]:
    """Yields `advance(bytes)`. total_bytes: None if unknown. every_seconds: interval of plain lines before the last."""
    if sys.stderr.isatty():
        columns = TextColumn("{task.description:<24}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
        with Progress(*columns, console=Console(stderr=True)) as display:
            task = display.add_task(label, total=total_bytes)
            yield lambda amount: display.advance(task, amount)
        return
    begun = last = time.monotonic()
    done = 0

    def advance(amount: int) -> None:
        nonlocal done, last
        done, now = done + amount, time.monotonic()
        if now - last >= every_seconds:
            last = now
            left = (now - begun) * (total_bytes / done - 1) if total_bytes and done else None
            say(f"{label}: {done / 1e6:.1f} MB" + (f", {left:.0f} s left" if left is not None else ""))

    yield advance
    say(f"{label}: {done / 1e6:.1f} MB in {time.monotonic() - begun:.1f} s")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
