"""Time stamps on a device, which need not wait for it: on CUDA events of the current stream."""

import time
from typing import Any

import torch


class Clock:
    """Takes moments, and tells the seconds between two of them."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Waits until the device has reached all moments, which `seconds` needs."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, start: Any, end: Any) -> float:
        passed: float = start.elapsed_time(end) / 1000 if self.cuda else end - start
        return passed
