"""Host memory that a training process shares with the process that writes its checkpoints."""

import mmap
import os
import tempfile
import warnings

import torch


def memory_file() -> int:
    """A descriptor of an empty file without a name, which is gone with the processes that have it open.

    On Linux it lies in memory, whatever the size of /dev/shm, which is small in many containers.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create("checkpoint")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class Buffer:
    """A memory file as this process sees it. pin: GPUs copy to it in the background."""

    def __init__(self, file: int, pin: bool = False) -> None:
        self.file, self.pin, self.pinned = file, pin, 0  # the address that is pinned
        self.memory = mmap.mmap(-1, 1)

    def map(self, length: int) -> None:
        """Makes `memory` the file's first bytes; the file grows to so many, if it has less."""
        length = max(length, 1)  # an empty file can't be mapped
        self.unpin()
        if os.fstat(self.file).st_size < length:
            os.ftruncate(self.file, length)
        self.memory = mmap.mmap(self.file, length)
        if self.pin:
            bytes_of = torch.frombuffer(self.memory, dtype=torch.uint8)
            failed = int(torch.cuda.cudart().cudaHostRegister(bytes_of.data_ptr(), length, 1))  # 1: for all contexts
            if failed:
                warnings.warn(f"memory for checkpoints is not pinned (CUDA error {failed}): copies wait", stacklevel=2)
            else:
                self.pinned = bytes_of.data_ptr()

    def unpin(self) -> None:
        if self.pinned:
            torch.cuda.cudart().cudaHostUnregister(self.pinned)
        self.pinned = 0

    def close(self) -> None:
        self.unpin()
        os.close(self.file)
