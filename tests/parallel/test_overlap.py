"""Two halves of a batch in turns: the tokens of one travel while the other computes."""

import pytest

from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check
from dsv3_lightning.errors import ConfigError
from tests.parallel.conftest import on_ranks


@pytest.mark.parametrize("ranks", [2, 4])
def test_halves_in_turns_give_losses_and_gradients_of_the_whole_batch(ranks, tmp_path):
    """With each way of recomputation, and on four ranks over two nodes and with sharded experts. On two ranks also the
    order of attention, experts, messages and waiting, forward and backward."""
    on_ranks(ranks, tmp_path / "run", ["tests.parallel.overlap_worker"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["strategy={kind: fsdp2, overlap: two_batches}"], "strategy.overlap=two_batches: tokens travel only where"),
        (
            ["strategy={kind: fsdp2_ep, overlap: two_batches, pipeline_parallel: 2}"],
            "strategy.overlap=two_batches: is for runs without a pipeline",
        ),
        (
            ["strategy={kind: fsdp2_ep, overlap: halves}"],
            'strategy.overlap="halves": must be none, two_batches or pairs',
        ),
        (
            ["strategy={kind: fsdp2_ep, overlap: two_batches}", "trainer.accumulate_grad_batches=4"],
            "data.batch_size=8: strategy.overlap=two_batches needs two sequences in each of "
            "accumulate_grad_batches × devices × num_nodes = 8 parts; use 16, or overlap: none",
        ),
    ],
)
def test_what_has_nothing_to_overlap_is_refused(overrides, message):
    with pytest.raises(ConfigError) as error:
        check(compose(["nano"], [*overrides, "trainer.devices=2"]).tree)
    assert message in str(error.value)
