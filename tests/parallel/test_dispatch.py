"""Tokens reach their experts on other ranks and come back, however few or many."""

import pytest
import torch

from dsv3_lightning.model.router import Router
from dsv3_lightning.parallel.dispatch import slots_by_rank
from tests.parallel.conftest import on_ranks
from tests.parallel.small import EXPERTS, config


@pytest.mark.parametrize("ranks", [2, 4])
def test_outputs_and_gradients_are_those_of_one_process(ranks, tmp_path):
    """Uneven loads, all tokens to one rank, a rank without tokens, a rank whose experts get none."""
    on_ranks(ranks, tmp_path / "run", ["tests.parallel.dispatch_worker"])


@pytest.mark.parametrize("allowed", [1, 2, 4])
def test_a_token_is_sent_to_as_many_ranks_as_groups_are_allowed(allowed):
    """V3 §2.1.2: where a group is what one node has, a token visits at most topk_group nodes, and some visit all."""
    torch.manual_seed(0)
    router = Router(config(n_routed_experts=32, num_experts_per_tok=8, n_group=4, topk_group=allowed))
    torch.nn.init.normal_(router.weight)
    router.expert_bias.normal_()
    messages = []
    for x_1D in torch.randn(200, 1, 16):
        counts_E = torch.bincount(router(x_1D)[0].flatten(), minlength=32)
        messages.append(int((slots_by_rank(counts_E, ranks=4) > 0).sum()))
    assert max(messages) == allowed


def test_slots_are_counted_by_the_rank_of_their_expert():
    counts_E = torch.arange(EXPERTS)  # 0 1 | 2 3 | 4 5 | 6 7
    assert slots_by_rank(counts_E, 4).tolist() == [1, 5, 9, 13]
