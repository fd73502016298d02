"""Pipelines that can't be: one line with the nearest that works, without torch (tests/config/test_early.py)."""

import pytest

from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check
from dsv3_lightning.errors import ConfigError

BASE = ("trainer.devices=4", "model.num_hidden_layers=8", "data.batch_size=16")


def checked(strategy: str, *words: str):
    return check(compose(["nano"], [*BASE, f"strategy={{kind: fsdp2, {strategy}}}", *words]).tree)


@pytest.mark.parametrize(
    ("strategy", "words", "message"),
    [
        ("pipeline_parallel: 3", (), "strategy.pipeline_parallel=3: does not divide 4 processes; use 2 or 4"),
        ("pipeline_parallel: 0", (), "strategy.pipeline_parallel=0: must be at least 1"),
        ("pipeline_parallel: 4, schedule: dualpipev, micro_batches: 4", (),
         "strategy.micro_batches=4: dualpipev on 4 ranks needs at least twice pipeline_parallel; use 8"),
        ("pipeline_parallel: 4, schedule: 1f1b, micro_batches: 2", (),
         "strategy.micro_batches=2: 1f1b on 4 ranks needs at least pipeline_parallel; use 4"),
        ("pipeline_parallel: 2, schedule: interleaved_1f1b, micro_batches: 5", (),
         "strategy.micro_batches=5: interleaved_1f1b on 2 ranks needs a multiple of max(1, micro_batches // 2); use 6"),
        ("pipeline_parallel: 2, schedule: zero", (), "strategy.schedule="),
        ("pipeline_parallel: 4", ("model.num_hidden_layers=6",),
         "model.num_hidden_layers=6: 8 chunks of a pipeline need at least 7"),
        ("pipeline_parallel: 2, stages: [2, 4, 2]", (), "stages=[2, 4, 2]: has 3 chunks; zbv on 2 ranks has 4"),
        ("pipeline_parallel: 2, stages: [4, 0, 2, 2]", (), "strategy.stages=[4, 0, 2, 2]: chunk 1 has no layer"),
        ("pipeline_parallel: 2, stages: [4, 1, 1, 1]", (), "strategy.stages=[4, 1, 1, 1]: has 7 layers; must have"),
        ("pipeline_parallel: 2, schedule: 1f1b, stages: [2, 2, 2, 2]", (), "has 4 chunks; 1f1b on 2 ranks has 2"),
        ("pipeline_parallel: 2", ("trainer.accumulate_grad_batches=2",),
         "trainer.accumulate_grad_batches=2: a pipeline's micro-batches are strategy.micro_batches"),
        ("pipeline_parallel: 2", ("model.tie_word_embeddings=true",), "tie_word_embeddings=true needs one weight"),
        ("pipeline_parallel: 2, micro_batches: 5", (),
         "batch_size=16: does not divide into micro_batches=5 × 2 data-parallel ranks = 10 equal parts; use 10 or 20"),
        ("pipeline_parallel: 2, schedule: dualpipev, micro_batches: 8",
         ("data.batch_ramp={start: 4, increment: 4, tokens: 999}",),
         "data.batch_ramp: micro-batches of a step of 4 samples=2: dualpipev on 2 ranks needs"),
        ("pipeline_parallel: 2, cpu_offload: true", (), "strategy.cpu_offload=true: is not for pipelines"),
        ("pipeline_parallel: 2, overlap: two_batches", (), "overlap=two_batches: is for runs without a pipeline"),
        ("pipeline_parallel: 2, dp_shard: 4", (), "strategy.dp_shard=4: with dp_replicate=1 it makes 4 processes"),
        ("micro_batches: 4", (), "strategy.micro_batches=4: is of a pipeline, and strategy.pipeline_parallel is 1"),
        ("stages: [8]", (), "strategy.stages=[8]: is of a pipeline"),
        ("waiting_weights: 2", (), "waiting_weights=2: is for pipelines with schedule: interleaved_zero_bubble"),
        ("pipeline_parallel: 2, schedule: 1f1b, waiting_weights: 2", (), "dualpipev; set it to null"),
        ("pipeline_parallel: 2, waiting_weights: 0", (), "strategy.waiting_weights=0: must be at least 1, or null"),
    ],
)  # fmt: skip
def test_what_a_pipeline_cannot_be_is_refused_with_what_it_can(strategy, words, message):
    with pytest.raises(ConfigError) as refused:
        checked(strategy, *words)
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"])
def test_the_default_number_of_micro_batches_suits_every_schedule(schedule):
    for stages in (2, 4):
        checked(f"pipeline_parallel: {stages}, schedule: {schedule}")


def test_uneven_splits_by_hand_and_more_chunks_for_interleaved_schedules_are_taken():
    checked("pipeline_parallel: 2, stages: [1, 5, 2, 0]")
    checked("pipeline_parallel: 2, schedule: interleaved_1f1b, stages: [2, 2, 1, 1, 1, 1]")
