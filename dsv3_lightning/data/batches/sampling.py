"""The order of the samples, a function of only the seed and the sample's number in the run. Imports no torch.

Samples are numbered 0, 1, 2, … over the whole run. Each step takes the next `batch_size` of them; micro-batch m of A on
rank r of W is part m · W + r of those. So the order is the same for any number of ranks, micro-batches and loader
processes, and the position is a single integer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dsv3_lightning.errors import ConfigError

CHUNK = 1 << 16  # samples at a time


class MicroBatch(NamedTuple):
    """A micro-batch on one rank. samples [B] int64: positions in the packed index, -1 for none. target_counts
    [P] int64: valid targets of each head in the step's samples of all ranks and micro-batches.
    step_samples: in a step's first micro-batch, if requested, the samples of all its micro-batches on this rank.
    """

    samples: np.ndarray
    target_counts: np.ndarray
    step_samples: np.ndarray | None = None


@dataclass(frozen=True)
class Layout:
    """The division of a step's samples into `accumulate` micro-batches on each of `ranks`, of which this is `rank`.

    Raises ConfigError if they don't divide evenly.
    """

    batch_size: int
    accumulate: int = 1
    ranks: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        parts = self.accumulate * self.ranks
        if rest := self.batch_size % parts:
            nearest = [size for size in (self.batch_size - rest, self.batch_size - rest + parts) if size]
            raise ConfigError(
                f"data.batch_size={self.batch_size}: {self.ranks} ranks x trainer.accumulate_grad_batches="
                f"{self.accumulate} need a multiple of {parts}, such as {' or '.join(map(str, nearest))}"
            )

    @property
    def micro_batch_size(self) -> int:
        return self.batch_size // self.accumulate // self.ranks


class TrainSampler:
    """Samples steps first_step .. max_steps - 1, beginning with the run's sample number first_sample.

    Its length is that of the whole run even if it begins later, since Lightning counts what was drawn before a resume.
    target_counts [samples, P] int64: those of each sample. whole_steps: whether micro-batches have `step_samples`.
    sizes: samples of each step of the run, int64 [max_steps]; default: `layout.batch_size`.
    """

    def __init__(
        self,
        target_counts: np.ndarray,
        layout: Layout,
        seed: int,
        max_steps: int,
        *,
        first_step: int = 0,
        first_sample: int = 0,
        whole_steps: bool = False,
        sizes: np.ndarray | None = None,
    ) -> None:
        self.target_counts, self.layout, self.seed = target_counts, layout, seed
        self.whole_steps = whole_steps
        self.sizes = np.full(max_steps, layout.batch_size) if sizes is None else sizes
        self.max_steps, self.first_step, self.first_sample = max_steps, first_step, first_sample

    def __len__(self) -> int:
        return self.max_steps * self.layout.accumulate

    def __iter__(self) -> Iterator[MicroBatch]:
        layout = self.layout
        order = Order(len(self.target_counts), self.seed)
        first = self.first_sample
        for size in map(int, self.sizes[self.first_step :]):
            samples = order[first : first + size]
            first += size
            target_counts = self.target_counts[samples].sum(0)
            parts = samples.reshape(layout.accumulate, layout.ranks, -1)[:, layout.rank]
            for number, part in enumerate(parts):
                yield MicroBatch(part, target_counts, parts.reshape(-1) if self.whole_steps and number == 0 else None)


class ValidationSampler:
    """Samples every sample once in a fixed order, of which rank r takes numbers r, r + W, ….

    The order is shuffled, so that the first few batches represent all documents. All ranks draw equally often, with -1
    if no sample is left.
    limit: maximum number of batches of `layout.batch_size` samples, or a share of them. The samples don't depend on the
    number of ranks and micro-batches.
    """

    def __init__(self, target_counts: np.ndarray, layout: Layout, limit: int | float = 1.0) -> None:
        self.target_counts, self.layout = target_counts, layout
        size, samples = layout.batch_size, len(target_counts)
        batches = limit if isinstance(limit, int) else max(1, int(limit * -(-samples // size)))
        self.samples = min(samples, batches * size)

    def __len__(self) -> int:
        return -(-self.samples // (self.layout.ranks * self.layout.micro_batch_size))

    def __iter__(self) -> Iterator[MicroBatch]:
        size, ranks = self.layout.micro_batch_size, self.layout.ranks
        order = permutation(len(self.target_counts), seed=0, epoch=0)[: self.samples]
        for first in range(0, len(self) * size * ranks, size * ranks):
            together = order[first : first + size * ranks]
            samples = np.full(size, -1, dtype=np.int64)
            own = together[self.layout.rank :: ranks]
            samples[: len(own)] = own
            yield MicroBatch(samples, self.target_counts[together].sum(0))


class Order:
    """A sliceable order of `count` samples: order[a:b] are those numbered a .. b - 1 in the run, int64 [b - a]."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self.epoch, self.permutation = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, numbers: slice) -> np.ndarray:
        parts, number = [], numbers.start
        while number < numbers.stop:
            epoch, start = divmod(number, self.count)
            if epoch != self.epoch:
                self.epoch, self.permutation = epoch, permutation(self.count, self.seed, epoch)
            parts.append(self.permutation[start : start + numbers.stop - number])
            number += len(parts[-1])
        return np.concatenate(parts)


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers 0 .. count - 1 in an order that depends only on seed and epoch, int64 [count].

    They are sorted by a hash because a library's random generator may change with its version.
    """
    key = mix(mix(np.array([seed & (1 << 64) - 1], dtype=np.uint64)) + np.array([epoch], dtype=np.uint64))
    hashes = np.empty(count, dtype=np.uint64)
    for begin in range(0, count, CHUNK):  # with 10^8 samples each step of `mix` would take another gigabyte
        part = hashes[begin : begin + CHUNK]
        part[:] = mix(np.arange(begin, begin + len(part), dtype=np.uint64) ^ key)
    return np.argsort(hashes).astype(np.int64, copy=False)


def mix(x: np.ndarray) -> np.ndarray:
    """The splitmix64 hash (Steele et al. 2014, doi 10.1145/2660193.2660195): a bijection of uint64, so without ties."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
