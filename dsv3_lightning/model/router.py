"""The router: which experts a token goes to, and with which weights (V3 §2.1.2, eq. 12-16; V2 §2.2 for softmax)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_lightning.model.config import ModelConfig


class Routing(NamedTuple):
    """What the router decided for N tokens.

    experts_NK: chosen experts, int64. gates_NK: their weights, fp32. scores_NE: affinities, fp32, from logits_NE.
    """

    experts_NK: Tensor
    gates_NK: Tensor
    scores_NE: Tensor
    logits_NE: Tensor


class Router(nn.Module):
    """x [N, D] -> Routing. Changes no state: `expert_bias` (fp32 [E], saved) is moved from outside, once per step.

    replay: int64 [N, K], experts to take in place of the router's own choice, until the backward pass is over.
    Everything from the logits on is fp32, whatever the precision of the rest.
    """

    expert_bias: Tensor
    replay: Tensor | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("expert_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Keeps `expert_bias` in fp32 under `model.bfloat16()`: in bf16 a step of 0.001 is lost at 0.5."""
        bias_E = self.expert_bias
        super()._apply(fn, recurse)
        if self.expert_bias.itemsize < bias_E.itemsize:
            self.expert_bias = bias_E.to(self.expert_bias.device)
        return self

    def forward(self, x_ND: Tensor) -> Routing:
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = F.linear(x_ND.float(), self.weight.float())
            scores_NE = (
                logits_NE.sigmoid() if self.config.scoring_func == "sigmoid" else logits_NE.softmax(-1)
            )  # eq. 15
            experts_NK, gates_NK = route(scores_NE, self.expert_bias, self.config, self.replay)
            return Routing(experts_NK, gates_NK, scores_NE, logits_NE)


def route(
    scores_NE: Tensor, expert_bias_E: Tensor, config: ModelConfig, chosen_NK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Chosen experts [N, K] int64 and gates [N, K]: the choice is biased (eq. 16), the gates are not (eq. 13).

    chosen_NK: experts that were chosen before, whose gates are those of these scores.
    """
    if chosen_NK is None:
        choice_NE = biased_scores(scores_NE.detach(), expert_bias_E, config)
        chosen_NK = choice_NE.topk(config.num_experts_per_tok, -1).indices
    experts_NK = chosen_NK
    gates_NK = scores_NE.gather(-1, experts_NK)
    if config.norm_topk_prob:
        gates_NK = gates_NK / (gates_NK.sum(-1, keepdim=True) + 1e-20)
    return experts_NK, gates_NK * config.routed_scaling_factor


def biased_scores(scores_NE: Tensor, expert_bias_E: Tensor, config: ModelConfig) -> Tensor:
    """Scores for top-k: s + b or s · (1 + b), -inf outside the selected groups."""
    additive = config.expert_bias_kind == "additive"
    return mask_unselected_groups(scores_NE + expert_bias_E if additive else scores_NE * (1 + expert_bias_E), config)


def mask_unselected_groups(choice_NE: Tensor, config: ModelConfig) -> Tensor:
    """-inf for experts outside each token's `topk_group` best groups (V3 §2.1.2, node-limited routing).

    0 would not do: with a strongly negative bias an expert of an unselected group could win. A group's score is the
    sum of its two best experts' (V3: K/M = 2), or that of its best one (V2).
    """
    if config.n_group == 1:
        return choice_NE
    by_group = choice_NE.unflatten(-1, (config.n_group, -1))
    best = 2 if config.topk_method == "noaux_tc" else 1
    score_NG = by_group.topk(best, -1).values.sum(-1)
    unselected_NG = torch.ones_like(score_NG, dtype=torch.bool)
    unselected_NG.scatter_(-1, score_NG.topk(config.topk_group, -1).indices, False)
    return by_group.masked_fill(unselected_NG[..., None], -torch.inf).flatten(-2)
