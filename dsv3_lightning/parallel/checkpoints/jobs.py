"""What a rank tells the process that writes its shards, and the answer."""

import math
import mmap
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """A shard of the tensor `name`: `sizes` numbers along each dim from `offsets` on, at byte `at` of the buffer.

    whole: the size of the full tensor.
    """

    name: str
    whole: torch.Size
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    at: int

    @property
    def bytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize

    def within(self, memory: mmap.mmap) -> Tensor:
        """The piece in the buffer's memory, as a tensor of its own storage; it must have numbers."""
        raw = torch.frombuffer(memory, dtype=torch.uint8, count=self.bytes, offset=self.at)
        return raw.view(self.dtype).view(self.sizes)


class Plan(NamedTuple):
    """pieces: what the rank writes, in this order; some may have no numbers. length: of the buffer, in bytes."""

    pieces: list[Piece]
    length: int

    def with_numbers(self) -> list[Piece]:
        return [piece for piece in self.pieces if 0 not in piece.sizes]


class Save(NamedTuple):
    """Asks for a checkpoint. plan: None if it is that of the last one. rest: of the first rank, for rest.pt."""

    number: int
    path: Path
    plan: Plan | None
    rest: bytes


class NameAgain(NamedTuple):
    """Asks the first rank's process to give the last checkpoint a second name."""

    path: Path
    name: Path


NO_STORE = 3  # the exit code of a writer that finds no store: the first rank, which has it, is gone


class Failure(NamedTuple):
    """Why a checkpoint was not written. rank: the one that failed. reason: None if its training process is gone."""

    rank: int
    reason: str | None


class WriterGroup(NamedTuple):
    """A rank among the writers, and the store where they meet. name: the prefix of the names that they use there."""

    rank: int
    ranks: int
    host: str
    port: int
    name: str
