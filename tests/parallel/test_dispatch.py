"""Tokens reach their experts on other ranks and come back, however few or many."""

import pytest
import torch

from dsv3_lightning.parallel.dispatch import tokens_by_rank
from tests.parallel.conftest import on_ranks
from tests.parallel.small import EXPERTS


@pytest.mark.parametrize("ranks", [2, 4])
def test_outputs_and_gradients_are_those_of_one_process(ranks, tmp_path):
    """Uneven loads, all tokens to one rank, a rank without tokens, a rank whose experts get none.

    And on four ranks with a group of experts each: what arrives where is counted, and a token reaches at most
    topk_group of them (V3 §2.1.2, node-limited routing).
    """
    on_ranks(ranks, tmp_path / "run", ["tests.parallel.dispatch_worker"])


def test_routed_tokens_are_counted_by_the_rank_of_their_expert():
    counts_E = torch.arange(EXPERTS)  # 0 1 | 2 3 | 4 5 | 6 7
    assert tokens_by_rank(counts_E, 4).tolist() == [1, 5, 9, 13]
