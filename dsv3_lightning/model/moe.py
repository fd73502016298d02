"""DeepSeekMoE (V3 §2.1.2, eq. 12): the routed experts a token's router picks, plus the shared ones for everybody."""

import functools
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_lightning.model.balance import Choices, balance_terms
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.experts import Experts
from dsv3_lightning.model.router import Router, count_tokens


class RouterStats(NamedTuple):
    """What a MoE layer reports beside its output.

    counts_E: tokens per expert without padding, int64. balance: by name, what `balance_terms` gives.
    """

    counts_E: Tensor
    balance: dict[str, Tensor]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """x [B, T, D], mask [B, T] bool (False on padding) -> ([B, T, D], RouterStats)."""

    def __init__(self, config: ModelConfig, balance: tuple[str, ...] = ("sequence",)) -> None:
        super().__init__()
        self.config, self.balance = config, balance
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = (
            MLP(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)
            if config.n_shared_experts
            else None
        )

    def forward(self, x_BTD: Tensor, mask_BT: Tensor) -> tuple[Tensor, RouterStats]:
        x_ND = x_BTD.flatten(0, 1)
        experts_NK, gates_NK, scores_NE, logits_NE = self.gate(x_ND)
        shared = None if self.shared_experts is None else functools.partial(self.shared_experts, x_ND)
        out_BTD = self.experts(x_ND, experts_NK, gates_NK, meanwhile=shared).view_as(x_BTD)
        logits_BTE, scores_BTE, experts_BTK = (
            x.unflatten(0, mask_BT.shape) for x in (logits_NE, scores_NE, experts_NK)
        )
        choices = Choices(logits_BTE, scores_BTE, experts_BTK, mask_BT, self.config.n_group, self.config.topk_group)
        counts_E = count_tokens(experts_NK, mask_BT.flatten(), self.config.n_routed_experts)
        return out_BTD, RouterStats(counts_E, balance_terms(self.balance, choices))
