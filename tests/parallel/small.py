"""Tokens for a MoE layer on several ranks, each case another on every rank."""

import torch
from torch import Tensor

from dsv3_lightning.model.config import ModelConfig

EXPERTS, K, D = 8, 2, 16


def config(**changes) -> ModelConfig:
    shape = dict(
        vocab_size=64, hidden_size=D, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, kv_lora_rank=8,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=EXPERTS, num_experts_per_tok=K,
        moe_intermediate_size=24, max_position_embeddings=64,
    )  # fmt: skip
    return ModelConfig(**shape | changes)


def tokens_and_choices(case: str, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """x_ND, experts_NK and gates_NK of a rank."""
    generator = torch.Generator().manual_seed(100 + rank)
    N = 0 if case == "no tokens on rank 0" and rank == 0 else 5 + 3 * rank
    experts_NK = torch.rand(N, EXPERTS, generator=generator).argsort(1)[:, :K]
    if case == "one expert":  # all of every rank's tokens go to the last two
        experts_NK = torch.tensor([EXPERTS - 1, EXPERTS - 2]).expand(N, K)
    if case == "padding":  # of rank 0 nothing else, of the others every third token
        experts_NK[:: 3 if rank else 1] = -1
    if case == "no tokens for rank 0":  # the last half has them all
        experts_NK = experts_NK % (EXPERTS // 2) + EXPERTS // 2
    if case == "one node":  # every token wants experts of the first half alone
        experts_NK = experts_NK % (EXPERTS // 2)
        experts_NK[:, 1] = (experts_NK[:, 0] + 1) % (EXPERTS // 2)
    if case == "crossed":  # both experts of the other half, on one rank or on two
        far = EXPERTS // 2 * (rank < 2)
        experts_NK = far + torch.tensor([[0, 1], [0, 2], [3, 1]]).repeat(N, 1)[:N]
    return torch.randn(N, D, generator=generator), experts_NK, torch.rand(N, K, generator=generator)
