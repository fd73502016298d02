"""Scores of given tokens without gradients: their log-probabilities, and which tokens are the most likely."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv3_lightning.model.cpu import MAX_LOGITS, MAX_LOGITS_CPU

Head = Callable[[Tensor], Tensor]


class Scores(NamedTuple):
    """log_p_N: natural log-probability of each wanted token, fp32. best_N: the most likely token there, int64."""

    log_p_N: Tensor
    best_N: Tensor


def some_rows(h_ND: Tensor, vocab_size: int) -> tuple[Tensor, ...]:
    """The rows in parts for which all logits may exist at a time."""
    most = MAX_LOGITS_CPU if h_ND.device.type == "cpu" else MAX_LOGITS
    return h_ND.split(max(1, most // vocab_size))


@torch.no_grad()
def most_likely(head: Head, h_BTD: Tensor, vocab_size: int) -> Tensor:
    """The most likely next token of every position, int64 [B, T]."""
    # on a CPU argmax of bf16 takes six times as long as max, which finds the same index
    parts = [head(h_ND).max(-1).indices for h_ND in some_rows(h_BTD.flatten(0, 1), vocab_size)]
    return torch.cat(parts).view(h_BTD.shape[:2])


@torch.no_grad()
def token_scores(model: Any, tokens_BT: Tensor, mask_BT: Tensor, places_N: Tensor, wanted_N: Tensor) -> Scores:
    """Scores of wanted_N (int64), each predicted from one place of the batch, places_N (int64, row · T + position).

    mask_BT: bool, False on padding, which is on the right. A method of `Transformer`, so that a sharded model gathers
    its weights; every rank calls it equally often. Logits exist for a part of the places at a time.
    """
    h_ND = model.trunk(model.embed_tokens(tokens_BT), mask_BT)[0].flatten(0, 1)[places_N]
    V = model.config.vocab_size
    log_p, best = [], []
    for rows_ND, some_N in zip(some_rows(h_ND, V), some_rows(wanted_N, V), strict=True):
        logits_NV = model.lm_head(rows_ND).float()
        log_p.append(logits_NV.gather(1, some_N[:, None]).squeeze(1) - logits_NV.logsumexp(1))
        best.append(logits_NV.max(1).indices)
    return Scores(torch.cat(log_p), torch.cat(best))
