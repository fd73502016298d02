"""DPO and GRPO as weights of token losses: pure functions from log-probabilities to the loss and its gradient.

The gradient of each objective is Σ_t w_t ∇(-log π(o_t)), so that the fused loss of the output head takes the weights w,
and no logits are kept. Shapes: B sequences, T tokens; `valid` is False where a position predicts no token of an answer,
and log-probabilities are 0 there.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

STD_FLOOR = 1e-4  # added to the standard deviation of a group's rewards, as TRL does


class Outcome(NamedTuple):
    """value: the loss, a scalar. weights_BT: its derivative by each -log π. facts: sums for the log, by name."""

    value: Tensor
    weights_BT: Tensor
    facts: dict[str, Tensor]


def dpo(log_p_BT: Tensor, valid_BT: Tensor, reference_B: Tensor, beta: float, by_length: bool, scale: float) -> Outcome:
    """scale · Σ_pairs -log σ(β · (Δ_chosen - Δ_rejected)), Δ = log π(y) - log π_ref(y) (arXiv 2305.18290, eq. 7).

    The first half of the sequences are the chosen answers, the second half the rejected ones in the same order.
    reference_B: Σ_t log π_ref of each. by_length: Δ is divided by the answer's tokens.
    """
    lengths_B = valid_BT.sum(1).clamp(min=1).to(log_p_BT.dtype)
    per_token_B = 1 / lengths_B if by_length else torch.ones_like(reference_B)
    delta_B = ((log_p_BT * valid_BT).sum(1) - reference_B) * per_token_B
    chosen, rejected = delta_B.chunk(2)
    margin = beta * (chosen - rejected)
    losses = -F.logsigmoid(margin)
    pull = scale * beta * torch.sigmoid(-margin)
    weights_BT = (torch.cat((pull, -pull)) * per_token_B)[:, None] * valid_BT
    facts = {
        "loss": losses.sum(),
        "accuracy": (margin > 0).sum(),
        "margin": margin.sum(),
        "reward_chosen": beta * chosen.sum(),
        "reward_rejected": beta * rejected.sum(),
    }
    return Outcome(scale * losses.sum(), weights_BT, facts)


def grpo(
    log_p_BT: Tensor, old_BT: Tensor, reference_BT: Tensor | None, valid_BT: Tensor, advantages_B: Tensor,
    factors_B: Tensor, clip: tuple[float, float], beta: float,
) -> Outcome:  # fmt: skip
    """Σ_i f_i Σ_t [-min(ρ A_i, clip(ρ, 1 - ε_low, 1 + ε_high) A_i) + β k3], with ρ = π/π_old per token and
    k3 = π_ref/π - log(π_ref/π) - 1 (arXiv 2402.03300 eq. 3 and 4; two limits as in 2503.14476).

    The weight of a token is f_i (ρ A_i · [not clipped] + β (π_ref/π - 1)). factors_B: f_i, from `token_factors`.
    reference_BT: log π_ref, which β above 0 needs.
    """
    low, high = clip
    advantages_B1 = advantages_B[:, None]
    ratio_BT = (log_p_BT - old_BT).exp()
    clipped_low_BT = (ratio_BT < 1 - low) & (advantages_B1 < 0) & valid_BT
    clipped_high_BT = (ratio_BT > 1 + high) & (advantages_B1 > 0) & valid_BT
    gain_BT = torch.minimum(ratio_BT * advantages_B1, ratio_BT.clamp(1 - low, 1 + high) * advantages_B1)
    pull_BT = ratio_BT * advantages_B1 * ~(clipped_low_BT | clipped_high_BT)
    facts = {"clipped_low": clipped_low_BT.sum(), "clipped_high": clipped_high_BT.sum()}
    losses_BT = -gain_BT
    if reference_BT is not None:
        log_ratio_BT = reference_BT - log_p_BT
        kl_BT = log_ratio_BT.exp() - log_ratio_BT - 1
        losses_BT = losses_BT + beta * kl_BT
        pull_BT = pull_BT + beta * (log_ratio_BT.exp() - 1)
        facts["kl"] = (kl_BT * valid_BT).sum()
    factors_BT = factors_B[:, None] * valid_BT
    return Outcome((losses_BT * factors_BT).sum(), pull_BT * factors_BT, facts)


def token_factors(
    lengths_B: Tensor, variant: Literal["grpo", "dr_grpo", "dapo"], sequences: float, tokens: float, limit: int
) -> Tensor:
    """The factor of each sequence's token losses: 1/(N |o_i|), 1/(N L) or 1/Σ|o_i|.

    grpo: each sequence counts alike (arXiv 2402.03300). dr_grpo: a constant, so that long wrong answers cost as much
    per token as short ones (2503.20783). dapo: each token counts alike (2503.14476). sequences, tokens: N and Σ|o_i| of
    the whole step, over all micro-batches and ranks. limit: L, the longest answer that may be sampled.
    """
    if variant == "grpo":
        return 1 / (max(sequences, 1) * lengths_B.clamp(min=1))
    return torch.full_like(lengths_B, 1 / max(tokens if variant == "dapo" else sequences * limit, 1))


def advantages(rewards: Tensor, weights: Tensor, scale: Literal["group", "none"], each: bool) -> Tensor:
    """A = r - mean(r) within each group, over its standard deviation with scale=group (V3 eq. 28): [prompts, group].

    rewards: [functions, prompts, group], weights: [functions]. NaN where a function does not apply, which is left out
    of every sum, mean and deviation. An answer that no function scores has no advantage: NaN.
    each: the rewards of each function are normalized by themselves before they are weighted and added up, so that one
    with large numbers doesn't hide the others.
    """
    if each:
        return weighted_sum(torch.stack([centered(of_one, scale) for of_one in rewards]), weights)
    return centered(weighted_sum(rewards, weights), scale)


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Σ_f w_f v_f over the values that are not NaN; NaN where all are."""
    total = (values * weights[:, None, None]).nansum(0)
    return total.masked_fill(values.isnan().all(0), torch.nan)


def centered(rewards: Tensor, scale: str) -> Tensor:
    apart = rewards - rewards.nanmean(1, keepdim=True)
    if scale == "none":
        return apart
    # an answer that is the only one with a reward deviates by 0 from the mean, whatever it is divided by
    freedom = ((~rewards.isnan()).sum(1, keepdim=True) - 1).clamp(min=1)
    std = (apart.square().nansum(1, keepdim=True) / freedom).sqrt()
    return apart / (std + STD_FLOOR)


def without_contrast(found: Tensor) -> Tensor:
    """Which groups have no advantage other than 0, so that they teach nothing: bool [prompts]."""
    return (found.nan_to_num() == 0).all(1)
