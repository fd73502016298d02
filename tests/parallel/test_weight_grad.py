"""Weight gradients that are computed late reach the shards of FSDP2 as others do."""

import pytest

from tests.parallel.conftest import on_ranks


@pytest.mark.parametrize("ranks", [1, 2])
def test_late_weight_gradients_of_sharded_weights_are_the_same(ranks, tmp_path):
    """Over several micro-batches, with bf16 weights and experts on different ranks, too; reduced once, in fp32."""
    on_ranks(ranks, tmp_path / "run", ["tests.parallel.weight_grad_worker"])
