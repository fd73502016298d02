"""Metrics over steps and ranks (torchmetrics): sums are reduced, ratios computed last from global counts."""

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
    """A metric whose states are all sums; each is reduced over ranks by one all-reduce.

    torchmetrics itself gathers every rank's copy on every rank: for a state of 31 MB on 2,048 ranks, 127 GB.
    """

    full_state_update = False

    def add_sum(self, name: str, *shape: int, dtype: torch.dtype) -> None:
        self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def sync(self, dist_sync_fn: Any = None, *args: Any, **kwargs: Any) -> None:
        super().sync(dist_sync_fn or add_up, *args, **kwargs)


def add_up(value: Tensor, group: Any = None) -> list[Tensor]:
    """All-reduces in place, since torchmetrics keeps a copy for `unsync`. Returns a list, since it sums the result."""
    dist.all_reduce(value, group=group)
    return [value]


def means(totals: Tensor, counts: Tensor) -> list[float | None]:
    """total / count of each pair, in fp64. A mean over nothing (count 0) is None, neither 0 nor NaN.

    >>> means(torch.tensor([6.0, 0.0]), torch.tensor([4, 0]))
    [1.5, None]
    """
    pairs = zip(totals.double().tolist(), counts.tolist(), strict=True)
    return [total / count if count else None for total, count in pairs]


def mean_present(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are not None; None if there is none.

    >>> mean_present([1.0, None, 2.0]), mean_present([None])
    (1.5, None)
    """
    present = [value for value in values if value is not None]
    return statistics.fmean(present) if present else None


class TokenLoss(Sums):
    """Mean loss per token of each head, a list of 1 + mtp_depth: Σ nll / Σ valid targets, None without valid targets.

    update: nll_P (sums) and targets_BPT int64 with IGNORE; count_P, int64, where the sums are over something else.
    """

    nll_P: Tensor
    count_P: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.add_sum("nll_P", heads, dtype=torch.float64)
        self.add_sum("count_P", heads, dtype=torch.int64)

    def update(self, nll_P: Tensor, targets_BPT: Tensor, count_P: Tensor | None = None) -> None:
        self.nll_P += nll_P.detach()
        self.count_P += (targets_BPT != IGNORE).sum((0, 2)) if count_P is None else count_P

    def compute(self) -> list[float | None]:
        return means(self.nll_P, self.count_P)


class BitsPerByte(Sums):
    """Bits per byte of text of the main head: Σ nll / (ln 2 · Σ bytes), comparable between tokenizers.

    None if no text was predicted.
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


class SourceLoss(Sums):
    """Loss per token and bits per byte of the main head for each of K sources, lists of K; None without valid targets.

    update: source, the number of the source of all samples, int64; nll scalar (a sum, nats), targets_BT int64 with
    IGNORE, and target_bytes_B int64.
    """

    nll_K: Tensor
    count_K: Tensor
    bytes_K: Tensor

    def __init__(self, sources: int) -> None:
        super().__init__()
        self.add_sum("nll_K", sources, dtype=torch.float64)
        self.add_sum("count_K", sources, dtype=torch.int64)
        self.add_sum("bytes_K", sources, dtype=torch.int64)

    def update(self, source: Tensor, nll: Tensor, targets_BT: Tensor, target_bytes_B: Tensor) -> None:
        self.nll_K[source] += nll.detach()
        self.count_K[source] += (targets_BT != IGNORE).sum()
        self.bytes_K[source] += target_bytes_B.sum()

    def compute(self) -> tuple[list[float | None], list[float | None]]:
        return means(self.nll_K, self.count_K), means(self.nll_K / math.log(2), self.bytes_K)


class Acceptance(Sums):
    """Acceptance rate of MTP drafts in greedy speculative decoding: a list of mtp_depth shares.

    At position i module k drafts the token at i + k + 1, which the main model predicts at i + k. A draft is accepted if
    it and all shallower ones from the same position equal the main model's predictions. update: drafts_BPT and
    targets_BPT, int64, main head first. A position counts if module k and all shallower ones have a target there, and
    the main model has it at i + k: elsewhere decoding would draft nothing. None for a depth without such positions.
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
    """MaxVio of each MoE layer, [L] fp64: (max c - mean c) / mean c; 0 is perfect balance (arXiv 2408.15664 §4.1).

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
    """(max c - mean c) / mean c over the last dim, fp64; 0 if nothing was routed.

    >>> max_vio(torch.tensor([[2, 1, 1, 0], [5, 5, 5, 5]]))
    tensor([1., 0.], dtype=torch.float64)
    """
    counts_E = counts_E.double()
    mean = counts_E.mean(-1)
    return (counts_E.amax(-1) - mean) / mean.clamp(min=1e-9)
