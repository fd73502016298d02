"""What is averaged over steps and ranks, as torchmetrics: sums first, ratios last, from global counts."""

import math
import statistics
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from dsv3_lightning.model.losses import IGNORE


class Sums(Metric):
    """A metric whose states are all sums: ranks add each up in one all-reduce.

    torchmetrics gathers every rank's copy on every rank and sums them there: of 31 MB on 2,048 ranks, 127 GB.
    """

    full_state_update = False

    def add_sum(self, name: str, *shape: int, dtype: torch.dtype) -> None:
        self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def sync(self, dist_sync_fn: Any = None, *args: Any, **kwargs: Any) -> None:
        super().sync(dist_sync_fn or add_up, *args, **kwargs)


def add_up(value: Tensor, group: Any = None) -> list[Tensor]:
    """In place, as torchmetrics has kept a copy of each state for `unsync`; in a list, as it sums what it gets."""
    dist.all_reduce(value, group=group)
    return [value]


def means(totals: Tensor, counts: Tensor) -> list[float | None]:
    """total / count of each pair, in fp64. None where the count is 0: a mean over nothing is absent, neither 0 nor NaN.

    >>> means(torch.tensor([6.0, 0.0]), torch.tensor([4, 0]))
    [1.5, None]
    """
    pairs = zip(totals.double().tolist(), counts.tolist(), strict=True)
    return [total / count if count else None for total, count in pairs]


def mean_present(values: Iterable[float | None]) -> float | None:
    """The mean of what is there, None where nothing is.

    >>> mean_present([1.0, None, 2.0]), mean_present([None])
    (1.5, None)
    """
    present = [value for value in values if value is not None]
    return statistics.fmean(present) if present else None


class TokenLoss(Sums):
    """Mean loss per token of each head, a list of 1 + mtp_depth: Σ nll / Σ valid targets, None where there is none.

    update: nll_P (sums) and targets_BPT int64 with IGNORE.
    """

    nll_P: Tensor
    count_P: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.add_sum("nll_P", heads, dtype=torch.float64)
        self.add_sum("count_P", heads, dtype=torch.int64)

    def update(self, nll_P: Tensor, targets_BPT: Tensor) -> None:
        self.nll_P += nll_P.detach()
        self.count_P += (targets_BPT != IGNORE).sum((0, 2))

    def compute(self) -> list[float | None]:
        return means(self.nll_P, self.count_P)


class BitsPerByte(Sums):
    """Bits that the main head spends per byte of text: Σ nll / (ln 2 · Σ bytes); comparable between tokenizers.

    None where no text was predicted.
    update: nll scalar (a sum, nats) and target_bytes_B int64, the text bytes of the predicted tokens.
    """

    nll: Tensor
    bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_sum("nll", dtype=torch.float64)
        self.add_sum("bytes", dtype=torch.int64)

    def update(self, nll: Tensor, target_bytes_B: Tensor) -> None:
        self.nll += nll.detach()
        self.bytes += target_bytes_B.sum()

    def compute(self) -> float | None:
        return means(self.nll[None] / math.log(2), self.bytes[None])[0]


class Acceptance(Sums):
    """What greedy speculative decoding would keep of the MTP modules' guesses: a list of mtp_depth shares.

    Module k at place i guesses the token k + 1 places on, which the main model chooses at place i + k. A guess counts
    as kept where it and all shallower ones from the same place are the main model's own choice. update: drafts_BPT
    and targets_BPT, int64, main head first. A place counts where module k and all shallower ones have a target, and the
    main model has it too, k places on: elsewhere decoding would draft nothing. None for a depth without such places.
    """

    accepted: Tensor
    drafted: Tensor

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.add_sum("accepted", depth, dtype=torch.int64)
        self.add_sum("drafted", depth, dtype=torch.int64)

    def update(self, drafts_BPT: Tensor, targets_BPT: Tensor) -> None:
        depth, T = drafts_BPT.shape[1] - 1, drafts_BPT.shape[2]
        kept_BT = torch.ones_like(drafts_BPT[:, 0], dtype=torch.bool)
        valid_BPT = targets_BPT != IGNORE
        valid_BT = torch.ones_like(kept_BT)
        for k in range(1, depth + 1):
            kept_BT = kept_BT[:, : T - k] & (drafts_BPT[:, k, : T - k] == drafts_BPT[:, 0, k:])
            valid_BT = valid_BT[:, : T - k] & valid_BPT[:, k, : T - k] & valid_BPT[:, 0, k:]
            self.accepted[k - 1] += (kept_BT & valid_BT).sum()
            self.drafted[k - 1] += valid_BT.sum()

    def compute(self) -> list[float | None]:
        return means(self.accepted, self.drafted)


class MaxVio(Sums):
    """Worst overload of each MoE layer, [L] fp64: (max c - mean c) / mean c; 0 is balance (arXiv 2408.15664 §4.1).

    update: counts_LE int64. Over a whole validation set this is MaxVio_global.
    """

    counts_LE: Tensor

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__()
        self.add_sum("counts_LE", layers, experts, dtype=torch.int64)

    def update(self, counts_LE: Tensor) -> None:
        self.counts_LE += counts_LE

    def compute(self) -> Tensor:
        return max_vio(self.counts_LE)


def max_vio(counts_E: Tensor) -> Tensor:
    """(max c - mean c) / mean c over the last dim, fp64; 0 where nothing was routed.

    >>> max_vio(torch.tensor([[2, 1, 1, 0], [5, 5, 5, 5]]))
    tensor([1., 0.], dtype=torch.float64)
    """
    counts_E = counts_E.double()
    mean = counts_E.mean(-1)
    return (counts_E.amax(-1) - mean) / mean.clamp(min=1e-9)
