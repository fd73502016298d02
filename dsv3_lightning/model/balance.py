"""Balance losses: penalties for uneven routing. Pure functions of affinities and choices, all without their factor α.

Two kinds, distinguished by `whole_batch` in the table. Most are means over sequences, so micro-batches and ranks with
equally many sequences average to the whole batch's. `batch` and `switch` multiply frequencies f and affinities P of the
whole global batch. f carries no gradient, and P is a sum over tokens; so a layer reports that sum, Σ_t p_i,t [E], and
`batch_loss` puts it together with the token counts of the whole optimizer step, summed over micro-batches and ranks:
the exact gradient of the global loss, as contributions that add up.

f_i = E/(K·T) · tokens that chose expert i; perfect balance gives 1 for all losses but `z`.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3_lightning.model.balance_table import BALANCE_LOSSES


class Choices(NamedTuple):
    """A layer's routing of B sequences. n_group, topk_group: the devices of V2 §2.2.3, and how many a token visits."""

    logits_BTE: Tensor
    scores_BTE: Tensor
    experts_BTK: Tensor
    mask_BT: Tensor
    n_group: int = 1
    topk_group: int = 1


def balance_terms(names: tuple[str, ...], choices: Choices) -> dict[str, Tensor]:
    """By name: a scalar, or Σ_t p_t [E] for losses over the whole batch; fp32, whatever the precision around."""
    with torch.autocast(choices.scores_BTE.device.type, enabled=False):
        return {name: LOSSES[name](choices) for name in names}


def sequence_loss(choices: Choices) -> Tensor:
    """Σ_i f_i P_i per sequence, with affinities normalized to sum to 1; mean over the sequences (V3 eq. 17-20)."""
    return mean_f_dot_p(frequencies(choices), masked_mean(normalized(choices.scores_BTE), choices.mask_BT))


def expert_loss(choices: Choices) -> Tensor:
    """V2 eq. 23-25: Σ_i f_i P_i per sequence, with the affinities as they are (V2's softmax sums to 1)."""
    return mean_f_dot_p(frequencies(choices), masked_mean(choices.scores_BTE, choices.mask_BT))


def device_loss(choices: Choices) -> Tensor:
    """V2 eq. 26-28: Σ_d f'_d P'_d over the groups, f' the mean of their experts' f, P' the sum of their P."""
    f_BG = frequencies(choices).unflatten(-1, (choices.n_group, -1)).mean(-1)
    return mean_f_dot_p(f_BG, per_group(choices, masked_mean(choices.scores_BTE, choices.mask_BT)))


def communication_loss(choices: Choices) -> Tensor:
    """V2 eq. 29-31: Σ_d f''_d P''_d, f''_d = G/(M·T) · tokens that are sent to group d, P'' the sum of its P."""
    size = choices.scores_BTE.shape[-1] // choices.n_group
    sent_BTG = torch.zeros_like(choices.scores_BTE[..., : choices.n_group]).scatter(-1, choices.experts_BTK // size, 1)
    f_BG = masked_mean(sent_BTG, choices.mask_BT) * (choices.n_group / choices.topk_group)
    return mean_f_dot_p(f_BG, per_group(choices, masked_mean(choices.scores_BTE, choices.mask_BT)))


def z_loss(choices: Choices) -> Tensor:
    """Mean over tokens of log² Σ_i exp(logit_i), per sequence, then over sequences (arXiv 2202.08906 eq. 5)."""
    return masked_mean(choices.logits_BTE.logsumexp(-1, keepdim=True).square(), choices.mask_BT).mean()


def batch_sums(choices: Choices) -> Tensor:
    """Σ_t of normalized affinities [E]: the P of the batch-wise loss (V3 §4.5.3)."""
    return (normalized(choices.scores_BTE) * choices.mask_BT[..., None]).sum((0, 1))


def switch_sums(choices: Choices) -> Tensor:
    """Σ_t of softmax probabilities [E], also of a sigmoid router's logits (arXiv 2101.03961 eq. 4-6)."""
    return (choices.logits_BTE.softmax(-1) * choices.mask_BT[..., None]).sum((0, 1))


def batch_loss(sums_LE: Tensor, counts_LE: Tensor, experts_per_token: int) -> Tensor:
    """The contribution of these tokens to Σ_i f_i P_i of each layer [L]; those with the same counts add up to it.

    counts_LE: int64, tokens per expert of the whole optimizer step; f_i = E/(K·N) c_i, P_i = sums_i / N.
    """
    tokens_L1 = counts_LE.sum(-1, keepdim=True).double().clamp(min=1) / experts_per_token
    f_LE = counts_LE * (counts_LE.shape[-1] / experts_per_token) / tokens_L1
    return ((f_LE / tokens_L1).to(sums_LE.dtype) * sums_LE).sum(-1)


def normalized(scores_BTE: Tensor) -> Tensor:
    return scores_BTE / scores_BTE.sum(-1, keepdim=True)  # V3 eq. 19


def frequencies(choices: Choices) -> Tensor:
    """f [B, E] of each sequence, without gradient (V3 eq. 18); T counts its tokens without padding."""
    E, K = choices.scores_BTE.shape[-1], choices.experts_BTK.shape[-1]
    mask_BT1 = choices.mask_BT[..., None].to(choices.scores_BTE.dtype)
    chosen_BE = torch.zeros_like(choices.scores_BTE[:, 0])
    chosen_BE.scatter_add_(1, choices.experts_BTK.flatten(1), mask_BT1.expand(-1, -1, K).flatten(1))
    return chosen_BE * (E / K) / mask_BT1.sum(1).clamp(min=1)


def masked_mean(x: Tensor, mask_BT: Tensor) -> Tensor:
    """The mean of x [B, T, ...] over the tokens of each sequence that are not padding: [B, ...]."""
    mask_BT1 = mask_BT[..., None].to(x.dtype)
    return (x * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)


def per_group(choices: Choices, P_BE: Tensor) -> Tensor:
    return P_BE.unflatten(-1, (choices.n_group, -1)).sum(-1)


def mean_f_dot_p(f: Tensor, P: Tensor) -> Tensor:
    """Σ_i f_i P_i of each sequence, then the mean over the sequences."""
    return (f * P).sum(-1).mean()


def check_complete(functions: Iterable[str], table: Iterable[str]) -> None:
    """Raises AssertionError unless every loss of the table has its function, and every function its line there."""
    if unequal := set(functions) ^ set(table):
        raise AssertionError(f"balance losses with a function or a line in the table, but not both: {sorted(unequal)}")


LOSSES: dict[str, Callable[[Choices], Tensor]] = {
    "sequence": sequence_loss,
    "batch": batch_sums,
    "expert": expert_loss,
    "device": device_loss,
    "communication": communication_loss,
    "switch": switch_sums,
    "z": z_loss,
}
check_complete(LOSSES, BALANCE_LOSSES)
