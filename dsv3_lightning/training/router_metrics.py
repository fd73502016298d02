"""Router statistics: pure functions of token counts, and a metric of the routing decisions."""

import math

import torch
from torch import Tensor

from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.router import Routing, biased_scores
from dsv3_lightning.training.metrics import Sums, means


def relative_load(counts_E: Tensor) -> Tensor:
    """Each expert's load over the mean load, fp64; 1 is balanced. 0 if nothing was routed."""
    counts_E = counts_E.double()
    return counts_E / counts_E.mean(-1, keepdim=True).clamp(min=1e-9)


def load_statistics(counts_LE: Tensor, groups: int) -> dict[str, Tensor]:
    """Statistics of the expert load by name, each [L] fp64, from counts_LE int64.

    load_max, load_p95, load_p50, load_p5, load_min: maximum, percentiles and minimum of the relative load.
    load_cv: standard deviation over mean. load_entropy: entropy over log E; 1 is balance; absent for a single expert.
    dead_experts: share of experts without a token. group_load_max: the busiest group's relative load.

    >>> values = load_statistics(torch.tensor([[4, 2, 2, 0]]), 2)
    >>> {name: round(values[name].item(), 3) for name in ("load_max", "load_cv", "load_entropy", "dead_experts")}
    {'load_max': 2.0, 'load_cv': 0.707, 'load_entropy': 0.75, 'dead_experts': 0.25}
    """
    load_LE = relative_load(counts_LE)
    share_LE = load_LE / load_LE.shape[1]
    at = torch.tensor([1.0, 0.95, 0.5, 0.05, 0.0], dtype=torch.float64, device=load_LE.device)
    values = dict(
        zip(("load_max", "load_p95", "load_p50", "load_p5", "load_min"), load_LE.quantile(at, dim=1), strict=True)
    )
    if (experts := load_LE.shape[1]) > 1:
        values["load_entropy"] = -torch.special.xlogy(share_LE, share_LE).sum(1) / math.log(experts)
    return values | {
        "load_cv": load_LE.std(1, correction=0),
        "dead_experts": (counts_LE == 0).double().mean(1),
        "group_load_max": load_LE.unflatten(1, (groups, -1)).mean(2).amax(1),
    }


class ChoiceStatistics(Sums):
    """Statistics of each MoE layer's routing over a data set. update: the layer's number, Routing and mask_N of some
    tokens, and origins_N int64, the number of each token's origin, below `origins`.

    compute: by layer the mean margin between the last chosen expert and the first one left out (among the selected
    groups), and the mean number of groups per token, each None without tokens; together_LEE int64, tokens that chose
    both experts i and j (on the diagonal: i); counts_LOE int64, tokens per origin and expert.
    """

    margins_L: Tensor
    margin_tokens_L: Tensor
    groups_L: Tensor
    tokens_L: Tensor
    together_LEE: Tensor
    counts_LOE: Tensor

    def __init__(self, config: ModelConfig, origins: int = 1) -> None:
        super().__init__()
        self.config = config
        layers, experts = config.num_moe_layers, config.n_routed_experts
        self.add_sum("margins_L", layers, dtype=torch.float64)
        self.add_sum("margin_tokens_L", layers, dtype=torch.int64)
        self.add_sum("groups_L", layers, dtype=torch.int64)
        self.add_sum("tokens_L", layers, dtype=torch.int64)
        self.add_sum("together_LEE", layers, experts, experts, dtype=torch.int64)
        self.add_sum("counts_LOE", layers, origins, experts, dtype=torch.int64)

    def update(
        self, layer: int, routing: Routing, expert_bias_E: Tensor, mask_N: Tensor, origins_N: Tensor | None = None
    ) -> None:
        config, K = self.config, self.config.num_experts_per_tok
        scores_NE, experts_NK = routing.scores_NE[mask_N], routing.experts_NK[mask_N]
        chosen_NE = torch.zeros_like(scores_NE).scatter_(1, experts_NK, 1.0)
        if config.n_routed_experts // config.n_group * config.topk_group > K:
            best_NK = biased_scores(scores_NE, expert_bias_E, config).topk(K + 1).values
            self.margins_L[layer] += (best_NK[:, -2] - best_NK[:, -1]).double().sum()
            self.margin_tokens_L[layer] += mask_N.sum()
        self.groups_L[layer] += chosen_NE.unflatten(1, (config.n_group, -1)).amax(2).sum().long()
        self.tokens_L[layer] += mask_N.sum()
        self.together_LEE[layer] += (chosen_NE.T @ chosen_NE).long()  # sums of one batch are exact in fp32
        if origins_N is not None:
            self.counts_LOE[layer].index_add_(0, origins_N[mask_N], chosen_NE.long())

    def compute(self) -> tuple[list[float | None], list[float | None], Tensor, Tensor]:
        margins, groups = means(self.margins_L, self.margin_tokens_L), means(self.groups_L, self.tokens_L)
        return margins, groups, self.together_LEE, self.counts_LOE


def relative_coactivation(together_EE: Tensor) -> Tensor:
    """Co-activation of expert pairs relative to independent choices with the same loads, fp64 [E, E].

    This is P(j | i) / P(j), so 1 is independence. The diagonal is 1.
    """
    together_EE = together_EE.double()
    loads_E = together_EE.diagonal(dim1=-2, dim2=-1)
    # each of a token's K experts pairs with K, itself included: Σ together = K · Σ loads = K² · tokens
    tokens = loads_E.sum(-1).square() / together_EE.sum((-2, -1)).clamp(min=1)
    chance_EE = loads_E[..., :, None] * loads_E[..., None, :] / tokens.clamp(min=1)[..., None, None]
    eye = torch.eye(together_EE.shape[-1], dtype=torch.bool, device=together_EE.device)
    return (together_EE / chance_EE.clamp(min=1e-9)).masked_fill(eye, 1.0)


def specialization(counts_OE: Tensor) -> Tensor:
    """Total variation distance between the loads of an origin and of all tokens, [...] fp64, from counts [..., S, E].

    For origin s it is half of Σ_e |load share of s on e - load share of all on e|; the result is the mean over origins,
    weighted by their tokens. 0: experts don't distinguish origins. Near 1: each origin has different experts.

    >>> specialization(torch.tensor([[[4, 0], [0, 4]], [[3, 1], [3, 1]]]))
    tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    counts_OE = counts_OE.double()
    total = counts_OE.sum((-2, -1)).clamp(min=1)
    of_each_OE = counts_OE / counts_OE.sum(-1, keepdim=True).clamp(min=1)
    of_all_E = counts_OE.sum(-2, keepdim=True) / total[..., None, None]
    distance_O = (of_each_OE - of_all_E).abs().sum(-1) / 2
    return (distance_O * counts_OE.sum(-1)).sum(-1) / total
