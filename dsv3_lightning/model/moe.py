"""DeepSeekMoE (V3 §2.1.2, eq. 12): the routed experts that each token's router picks, plus the shared ones for all."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_lightning.model.balance import Choices, balance_terms
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.dispatch import Dispatcher, LocalDispatcher
from dsv3_lightning.model.experts import Experts
from dsv3_lightning.model.router import Router, Routing
from dsv3_lightning.model.weight_grad import Linear


class RouterStats(NamedTuple):
    """What a MoE layer reports in addition to its output.

    counts_E: tokens per expert without padding, int64. balance: by name, the result of `balance_terms`.
    """

    counts_E: Tensor
    balance: dict[str, Tensor]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, width)
        self.up_proj = Linear(hidden_size, width)
        self.down_proj = Linear(width, hidden_size)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.feed_forward(x)


class DenseMLP(MLP):
    """The feed-forward network of a dense layer, with the signature of MoE: it reports nothing."""

    def forward(self, x_BTD: Tensor, mask_BT: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return self.feed_forward(x_BTD), None


class MoE(nn.Module):
    """x [B, T, D], mask [B, T] bool (False on padding) -> ([B, T, D], RouterStats)."""

    def __init__(self, config: ModelConfig, balance: tuple[str, ...] = ("sequence",)) -> None:
        super().__init__()
        self.config, self.balance = config, balance
        self.gate = Router(config)
        self.experts = Experts(config)
        self.dispatcher: Dispatcher = LocalDispatcher(config.n_routed_experts)
        self.shared_experts = (
            MLP(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)
            if config.n_shared_experts
            else None
        )

    def forward(self, x_BTD: Tensor, mask_BT: Tensor) -> tuple[Tensor, RouterStats]:
        x_ND = x_BTD.flatten(0, 1)
        routing = self.gate(x_ND)
        sent = self.dispatcher.dispatch(x_ND, without_padding(routing.experts_NK, mask_BT), routing.gates_NK)
        # While the tokens travel. What selective checkpointing keeps for the backward pass comes before `send_back`.
        shared_ND = None if self.shared_experts is None else self.shared_experts(x_ND)
        stats = RouterStats(sent.counts_E, self.balance_terms(routing, mask_BT))

        y_RD = self.experts(*self.dispatcher.receive(sent))
        routed_ND = self.dispatcher.combine(self.dispatcher.send_back(y_RD, sent))
        out_ND = routed_ND if shared_ND is None else routed_ND + shared_ND
        return out_ND.view_as(x_BTD), stats

    def balance_terms(self, routing: Routing, mask_BT: Tensor) -> dict[str, Tensor]:
        logits_BTE, scores_BTE = (x_NE.unflatten(0, mask_BT.shape) for x_NE in (routing.logits_NE, routing.scores_NE))
        experts_BTK = routing.experts_NK.unflatten(0, mask_BT.shape)
        choices = Choices(logits_BTE, scores_BTE, experts_BTK, mask_BT, self.config.n_group, self.config.topk_group)
        return balance_terms(self.balance, choices)


def without_padding(experts_NK: Tensor, mask_BT: Tensor) -> Tensor:
    """The experts, with -1 for padding, which goes nowhere."""
    return experts_NK.masked_fill(~mask_BT.flatten()[:, None], -1)
