"""Paired passes of DualPipeV in turns: one computes while the other's tokens travel to their experts and back."""

import pytest

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.parallel.mesh import StrategyConfig
from tests.parallel.conftest import on_ranks


def test_passes_in_turns_give_the_gradients_of_passes_one_after_the_other(tmp_path):
    """With each way of recomputation; and the order of attention, experts, messages and waiting."""
    on_ranks(2, tmp_path / "run", ["tests.parallel.pipeline.pairs_worker"])


@pytest.mark.parametrize(
    ("settings", "others"),
    [
        ({"pipeline_parallel": 2, "schedule": "zbv"}, "set it to none"),
        ({"kind": "fsdp2_ep", "expert_parallel": 2}, "set it to two_batches or none"),
    ],
)
def test_pairs_are_refused_where_no_passes_are_paired(settings, others):
    with pytest.raises(ConfigError, match=f"^strategy.overlap=pairs: .* dualpipev has; {others}$"):
        StrategyConfig(**{"kind": "fsdp2", "overlap": "pairs"} | settings)
