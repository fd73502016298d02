"""Small models and batches for the numerics tests: every part of V3 is on, and nothing has its neutral value.

Norm weights are not 1, expert biases not 0, and matrices are large enough for logits of several units, so that a part
left out, or put in the wrong place, shows in the first digits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.losses import IGNORE
from dsv3_lightning.model.router import Router, mask_unselected_groups
from dsv3_lightning.model.transformer import Losses, Transformer

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 512,
    "rope_theta": 100.0,
    "initializer_range": 0.15,
}


class Batch(NamedTuple):
    """What `Transformer.losses` takes: tokens and mask [B, T + 1 + mtp_depth], targets [B, 1 + mtp_depth, T]."""

    tokens: Tensor
    mask: Tensor
    targets: Tensor


def small_config(**changes) -> ModelConfig:
    return ModelConfig(**(SHAPE | changes))


def small_model(
    config: ModelConfig,
    seed: int = 0,
    bias: tuple[float, float] = (-0.5, 0.2),
    activation_checkpointing: str = "none",
    balance: tuple[str, ...] = ("sequence",),
) -> Transformer:
    """Initialized, then taken out of every neutral value. bias: mean and std of the expert biases."""
    model = Transformer(config, activation_checkpointing, balance)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
        for router in routers(model):
            router.expert_bias.normal_(*bias, generator=generator)
    return model


def routers(model: torch.nn.Module) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def make_targets(tokens_BS: Tensor, depth: int, ignored: Tensor | None = None) -> Tensor:
    """[B, 1 + depth, T] token by token: head k at place i is asked for token i + 1 + k. `ignored` [B, S] bool."""
    B, S = tokens_BS.shape
    T = S - 1 - depth
    targets_BPT = torch.full((B, 1 + depth, T), IGNORE)
    for b in range(B):
        for k in range(1 + depth):
            for i in range(T):
                if ignored is None or not ignored[b, i + 1 + k]:
                    targets_BPT[b, k, i] = tokens_BS[b, i + 1 + k]
    return targets_BPT


def small_batch(config: ModelConfig, B: int = 2, T: int = 12, seed: int = 0, padding: tuple[int, ...] = ()) -> Batch:
    """Random tokens; the last `padding[b]` of sequence b are padding."""
    S = T + 1 + config.mtp_depth
    tokens_BS = torch.randint(config.vocab_size, (B, S), generator=torch.Generator().manual_seed(seed))
    mask_BS = torch.ones(B, S, dtype=torch.bool)
    for b, places in enumerate(padding):
        mask_BS[b, S - places :] = False
    return Batch(tokens_BS, mask_BS, make_targets(tokens_BS, config.mtp_depth, ~mask_BS))


def clear_batch(model: Transformer, B: int = 2, T: int = 12, padding: tuple[int, ...] = (), gap: float = 3e-5) -> Batch:
    """The first random batch with no choice of experts, or of groups, that hangs on rounding.

    Two correct programs may differ where two choices are equal to the last bit, and then by a whole expert.
    """
    for seed in range(50):
        batch = small_batch(model.config, B, T, seed, padding)
        if smallest_gap(model, batch) > gap:
            return batch
    raise AssertionError("no batch with clear choices")


@torch.no_grad()
def smallest_gap(model: Transformer, batch: Batch) -> float:
    """Over all tokens and routers: how far the last one chosen is above the first one left out, experts and groups."""
    gaps = [1.0]

    def look(router: Router, _args, routing) -> None:
        config, choice_NE = router.config, routing.scores_NE + router.expert_bias
        if config.n_group > config.topk_group:
            best = 2 if config.topk_method == "noaux_tc" else 1
            score_NG = choice_NE.unflatten(1, (config.n_group, -1)).sort(-1, descending=True).values[..., :best].sum(-1)
            order_NG = score_NG.sort(-1, descending=True).values
            gaps.append((order_NG[:, config.topk_group - 1] - order_NG[:, config.topk_group]).min().item())
        order_NE = mask_unselected_groups(choice_NE, config).sort(-1, descending=True).values
        K = config.num_experts_per_tok
        if K < order_NE.shape[1]:
            gaps.append((order_NE[:, K - 1] - order_NE[:, K]).min().item())

    handles = [router.register_forward_hook(look) for router in routers(model)]
    model.losses(*batch)
    for handle in handles:
        handle.remove()
    return min(gaps)


def total_loss(losses: Losses, targets_BPT: Tensor, mtp_weight: float = 0.3, balance_factor: float = 0.5) -> Tensor:
    """V3 eq. 17, 24, 25 from the sums; a large balance factor, so that its gradient counts."""
    mean_P = losses.nll_P / (targets_BPT != IGNORE).sum((0, 2))
    loss = mean_P[0] + balance_factor * losses.balance["sequence"].sum()
    return loss + mtp_weight * mean_P[1:].mean() if len(mean_P) > 1 else loss
