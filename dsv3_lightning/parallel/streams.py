"""Less waiting on CUDA: numbers are copied to the host in the background, and a second stream runs beside the first.

On a CPU there is neither, and everything runs in the order of the code.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor


class HostCopy:
    """Numbers [n] on their way to the host, which goes on queueing work until it asks for them."""

    def __init__(self, numbers: Tensor) -> None:
        pinned = torch.empty_like(numbers, device="cpu", pin_memory=numbers.is_cuda)
        self.host = pinned.copy_(numbers, non_blocking=True)
        self.arrived = now(numbers)

    def numbers(self) -> list[int]:
        """The numbers. This is the one moment of a layer's pass at which the host waits for the device."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.host.tolist()


def now(x: Tensor) -> torch.cuda.Event | None:
    """On CUDA, the moment at which what has been queued for x's device is done."""
    return torch.cuda.current_stream(x.device).record_event() if x.is_cuda else None


@contextmanager
def beside(start: torch.cuda.Event | None, *inputs: Tensor) -> Iterator[None]:
    """On CUDA, queues what is inside on a second stream, where it begins at the event `start`, not after the work that
    was queued since. inputs: the tensors of the current stream that it reads, in its backward pass, too.

    What is made inside is taken to the current stream by `arrived`, which waits for collectives alone.
    """
    if start is None:
        yield
        return
    stream = second_stream(inputs[0].device)
    stream.wait_event(start)
    for tensor in inputs:
        tensor.record_stream(stream)  # its memory is not used again before the second stream has read it
    with torch.cuda.stream(stream):
        yield


def arrived(received: Tensor) -> Tensor:
    """The result of a collective or of the second stream, once it is there, for use on the current stream. It has no
    gradient."""
    if isinstance(received, AsyncCollectiveTensor):
        received = received.wait()
    if received.is_cuda:
        received.record_stream(torch.cuda.current_stream(received.device))
    return received


@functools.cache
def second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
