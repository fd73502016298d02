"""Tokens reach their experts on other ranks and come back, however few or many."""

import pytest
import torch

from dsv3_lightning.parallel.dispatch import order_of_arrival, tokens_by_rank
from dsv3_lightning.parallel.messages import as_columns, columns, from_columns
from tests.parallel.conftest import on_ranks
from tests.parallel.small import EXPERTS


@pytest.mark.parametrize("ranks", [2, 4])
def test_outputs_and_gradients_are_those_of_one_process(ranks, tmp_path):
    """Uneven loads, all tokens to one rank, a rank without tokens, a rank whose experts get none, padding.

    On two ranks also what a layer costs with each way of recomputation: all-to-alls, and moments at which the host
    waits for the device.

    And on four ranks with a group of experts each: what arrives where is counted, and a token reaches at most
    topk_group of them (V3 §2.1.2, node-limited routing).
    """
    on_ranks(ranks, tmp_path / "run", ["tests.parallel.dispatch_worker"])


def test_a_token_travels_to_each_node_once(tmp_path):
    """Two nodes of two ranks: outputs and gradients of one process, exactly the bytes between nodes that the routing
    demands, and the costs of a layer, whatever the skew."""
    on_ranks(4, tmp_path / "run", ["tests.parallel.node_worker"])


def test_routed_tokens_are_counted_by_the_rank_of_their_expert():
    counts_E = torch.arange(EXPERTS)  # 0 1 | 2 3 | 4 5 | 6 7
    assert tokens_by_rank(counts_E, 4).tolist() == [1, 5, 9, 13]


def test_rows_are_arranged_by_expert_and_then_by_rank():
    counts_WE = torch.randint(4, (3, 5), generator=torch.Generator().manual_seed(0))
    keys_R = torch.arange(5).repeat(3).repeat_interleave(counts_WE.flatten())
    assert torch.equal(order_of_arrival(counts_WE, len(keys_R)), keys_R.argsort(stable=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gates_and_their_gradients_travel_exactly(dtype):
    numbers = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-8, 10, 6)
    sent = as_columns(numbers, dtype)
    assert sent.shape == (50, columns(3, dtype.itemsize)) and sent.shape[1] * dtype.itemsize % 16 == 0
    assert torch.equal(from_columns(sent, 3), numbers)
