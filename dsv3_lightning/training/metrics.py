"""What is averaged over steps and ranks, as torchmetrics: sums first, ratios last, from global counts."""

import math
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


class TokenLoss(Sums):
    """Mean loss per token of each head, [1 + mtp_depth]: Σ nll / Σ valid targets, NaN where there is none.

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

    def compute(self) -> Tensor:
        return self.nll_P / self.count_P


class BitsPerByte(Sums):
    """Bits that the main head spends per byte of text: Σ nll / (ln 2 · Σ bytes); comparable between tokenizers.

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

    def compute(self) -> Tensor:
        return self.nll / self.bytes / math.log(2)


class Acceptance(Sums):
    """What greedy speculative decoding would keep of the MTP modules' guesses, by depth: shares [mtp_depth], fp64.

    Module k at place i guesses the token k + 1 places on, which the main model chooses at place i + k. A guess counts
    as kept where it and all shallower ones from the same place are the main model's own choice. update: drafts_BPT
    and targets_BPT, int64, main head first; only places count where both have a target.
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
        for k in range(1, depth + 1):
            kept_BT = kept_BT[:, : T - k] & (drafts_BPT[:, k, : T - k] == drafts_BPT[:, 0, k:])
            valid_BT = valid_BPT[:, k, : T - k] & valid_BPT[:, 0, k:]
            self.accepted[k - 1] += (kept_BT & valid_BT).sum()
            self.drafted[k - 1] += valid_BT.sum()

    def compute(self) -> Tensor:
        return self.accepted / self.drafted.double()


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
