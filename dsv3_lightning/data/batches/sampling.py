"""The order of the samples, a function of only the seed and the sample's number in the run. Imports no torch.

Samples are numbered 0, 1, 2, … over the whole run. Each step takes the next `batch_size` of them; micro-batch m of A on
rank r of W is part m · W + r of those. So the order is the same for any number of ranks, micro-batches and loader
processes, and the position is a single integer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dsv3_lightning.data.batches.mixture import Mixture
from dsv3_lightning.data.batches.permutation import permuted
from dsv3_lightning.data.batches.ramp import micro_batches
from dsv3_lightning.data.batches.skips import Skip, shifted
from dsv3_lightning.errors import ConfigError

ORDER = "feistel"  # another name for another order: checkpoints of the old one are then refused


class MicroBatch(NamedTuple):
    """A micro-batch on one rank. samples [B] int64: positions in the packed index, -1 for none.
    step_samples: in the first micro-batch of a training step, the samples of all its micro-batches on this rank.
    source: in validation, the number of the source that all samples are from, if there are sources.
    """

    samples: np.ndarray
    step_samples: np.ndarray | None = None
    source: int | None = None


@dataclass(frozen=True)
class Layout:
    """The division of a step's samples into `accumulate` micro-batches on each of `ranks`, of which this is `rank`.

    pipelined: the micro-batches are a pipeline's, which takes all of a step's at once.
    Raises ConfigError if they don't divide evenly.
    """

    batch_size: int
    accumulate: int = 1
    ranks: int = 1
    rank: int = 0
    pipelined: bool = False

    def __post_init__(self) -> None:
        parts = self.accumulate * self.ranks
        setting = "strategy.micro_batches" if self.pipelined else "trainer.accumulate_grad_batches"
        if rest := self.batch_size % parts:
            nearest = [size for size in (self.batch_size - rest, self.batch_size - rest + parts) if size]
            raise ConfigError(
                f"data.batch_size={self.batch_size}: {self.ranks} ranks x {setting}={self.accumulate} "
                f"need a multiple of {parts}, such as {' or '.join(map(str, nearest))}"
            )

    @property
    def micro_batch_size(self) -> int:
        return self.batch_size // self.accumulate // self.ranks

    @property
    def drawn_at_once(self) -> int:
        """Samples of a batch that a rank draws."""
        return self.batch_size // self.ranks if self.pipelined else self.micro_batch_size

    def of_step(self, samples: int) -> "Layout":
        """The division of a step of fewer samples, whose micro-batches are at most as large. Raises ConfigError."""
        if samples % self.ranks:
            raise ConfigError(
                f"data.batch_ramp: a step of {samples} samples does not divide into {self.ranks} ranks; "
                f"its start and increment need multiples of {self.ranks}"
            )
        number = micro_batches(samples // self.ranks, self.micro_batch_size)
        return Layout(samples, number, self.ranks, self.rank, self.pipelined)

    def numbers(self) -> np.ndarray:
        """This rank's samples of a step, numbered from the step's first: int64 [accumulate, micro_batch_size]."""
        parts = np.arange(self.batch_size).reshape(self.accumulate, self.ranks, -1)
        return parts[:, self.rank]


class TrainSampler:
    """Samples steps first_step .. max_steps - 1, beginning with the run's sample number first_sample.

    Its length is that of the whole run even if it begins later, since Lightning counts what was drawn before a resume,
    and as if each step had as many micro-batches as the one with the most (see training/loops.py).
    count: samples of an epoch. sizes: samples of each step of the run, int64 [max_steps]; default: `layout.batch_size`.
    skips: samples that the run leaves out, each range at the beginning of a step.
    mixture: the order over sources with weights, which have the samples of an epoch together; None: one permutation.
    """

    def __init__(
        self,
        count: int,
        layout: Layout,
        seed: int,
        max_steps: int,
        *,
        first_step: int = 0,
        first_sample: int = 0,
        sizes: np.ndarray | None = None,
        skips: Sequence[Skip] = (),
        mixture: Mixture | None = None,
    ) -> None:
        self.count, self.layout, self.seed = count, layout, seed
        self.sizes = np.full(max_steps, layout.batch_size) if sizes is None else sizes
        self.max_steps, self.first_step, self.first_sample = max_steps, first_step, first_sample
        self.skips, self.mixture = skips, mixture

    def __len__(self) -> int:
        if self.layout.pipelined:
            return self.max_steps
        most = max((self.layout.of_step(int(size)).accumulate for size in np.unique(self.sizes)), default=0)
        return self.max_steps * most

    def __iter__(self) -> Iterator[MicroBatch]:
        first = self.first_sample
        for size in map(int, self.sizes[self.first_step :]):
            numbers = shifted(first, self.skips) + self.layout.of_step(size).numbers()
            samples = self.mixture.samples(numbers) if self.mixture else order(numbers, self.count, self.seed)
            first += size
            if self.layout.pipelined:
                samples = samples.reshape(1, -1)
            for number, part in enumerate(samples):
                yield MicroBatch(part, samples.reshape(-1) if number == 0 else None)


class ValidationSampler:
    """Samples every sample once in a fixed order, of which rank r takes numbers r, r + W, ….

    The order is shuffled, so that the first few batches represent all documents. All ranks draw equally often, with -1
    if no sample is left.
    limit: maximum number of batches of `layout.batch_size` samples, or a share of them. The samples don't depend on the
    number of ranks and micro-batches.
    sources: first sample and number of samples of each source; then no micro-batch has samples of two, and the limit
    is a share of every source, at least one sample.
    """

    def __init__(
        self,
        count: int,
        layout: Layout,
        limit: int | float = 1.0,
        sources: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self.count, self.layout, self.sources = count, layout, sources
        size = layout.batch_size
        batches = limit if isinstance(limit, int) else max(1, int(limit * -(-count // size)))
        self.samples = min(count, batches * size)

    def parts(self) -> list[tuple[int | None, int, int, int]]:
        """Source, first sample, number of samples and how many of them are drawn, of each part that is drawn apart."""
        if self.sources is None:
            return [(None, 0, self.count, self.samples)]
        return [
            (source, first, count, -(-count * self.samples // self.count))
            for source, (first, count) in enumerate(self.sources)
        ]

    def __len__(self) -> int:
        return sum(-(-drawn // (self.layout.ranks * self.layout.drawn_at_once)) for *_, drawn in self.parts())

    def __iter__(self) -> Iterator[MicroBatch]:
        size, ranks = self.layout.drawn_at_once, self.layout.ranks
        for source, start, count, drawn in self.parts():
            for first in range(0, drawn, size * ranks):
                own = np.arange(first, min(first + size * ranks, drawn))[self.layout.rank :: ranks]
                samples = np.full(size, -1, dtype=np.int64)
                samples[: len(own)] = start + permuted(own, count, seed=0, epoch=0)
                yield MicroBatch(samples, source=source)


def order(numbers: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The samples with these numbers in a run: int64 of the same shape. Each epoch of `count` has them once."""
    return permuted(numbers % count, count, seed, numbers // count)
