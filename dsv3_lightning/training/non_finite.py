"""The report on a skipped step: the ranks, parameters and samples that aren't finite."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsv3_lightning.parallel.tensors import local

SHOWN = 8  # sample numbers in a line


class Finding(NamedTuple):
    """What one rank has seen. samples: those of the micro-batches whose loss isn't finite, if any, else all of the
    step's on this rank. in_loss: whether a loss wasn't finite. parameters: names of those whose gradient, or this
    rank's shard of it, isn't finite.
    """

    rank: int
    in_loss: bool
    parameters: list[str]
    samples: list[int]


def find_on_rank(
    rank: int, parameters: Iterable[tuple[str, nn.Parameter]], micro_batches: list[tuple[Tensor, Tensor | None]]
) -> Finding:
    """Looks at this rank's gradients, and at the loss and sample numbers [B] of each micro-batch. Waits for them."""
    named = [(name, local(parameter.grad)) for name, parameter in parameters if parameter.grad is not None]
    finite = torch.stack([torch.isfinite(gradient).all().cpu() for _, gradient in named]).tolist() if named else []
    bad = [samples for loss, samples in micro_batches if not torch.isfinite(loss)]
    chosen = bad or [samples for _, samples in micro_batches]
    numbers = [number for samples in chosen if samples is not None for number in samples.tolist() if number >= 0]
    return Finding(rank, bool(bad), [name for (name, _), ok in zip(named, finite, strict=True) if not ok], numbers)


def gather_findings(own: Finding, ranks: int) -> list[Finding]:
    """The findings of all ranks, on every rank; all must call it."""
    if ranks == 1:
        return [own]
    found: list[Finding] = [own] * ranks
    dist.all_gather_object(found, own)
    return found


def describe(findings: list[Finding]) -> str:
    """One line: the ranks whose loss isn't finite, or else those that hold a gradient which isn't.

    A gradient has been summed over ranks, so that the samples of any rank may be at fault; a loss has not.

    >>> describe([Finding(0, False, ["a"], [1]), Finding(1, True, ["a", "b"], [7, 4])])
    'rank 1: loss of samples 7, 4'
    >>> describe([Finding(0, False, [], [1]), Finding(1, False, ["a", "b"], [7, 4])])
    'rank 1: gradient of a and 1 more, samples 7, 4'
    """
    blamed = [one for one in findings if one.in_loss] or [one for one in findings if one.parameters]
    words = [
        f"rank {one.rank}: loss of samples {listed(one.samples)}"
        if one.in_loss
        else f"rank {one.rank}: gradient of {one.parameters[0]}{more(len(one.parameters) - 1)}, "
        f"samples {listed(one.samples)}"
        for one in blamed[:2]
    ]
    others = f"; the same on {len(blamed) - 2} more ranks" if len(blamed) > 2 else ""
    return ("; ".join(words) or "only the norm over all gradients overflowed") + others


def listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:SHOWN])) + more(len(numbers) - SHOWN)


def more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""
