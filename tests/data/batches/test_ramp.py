"""A growing batch: sizes from their definition, and the same samples in the same order as ever."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dsv3_lightning.data.batches.module import TextDataModule
from dsv3_lightning.data.batches.ramp import batch_sizes, micro_batches, tokens_of
from dsv3_lightning.data.batches.sampling import Layout, order
from dsv3_lightning.data.config import BatchRamp, DataConfig
from dsv3_lightning.errors import ConfigError


def ramped(config: DataConfig, start: int, increment: int, tokens: int, **changes: Any) -> DataConfig:
    return dataclasses.replace(config, batch_ramp=BatchRamp(start=start, increment=increment, tokens=tokens), **changes)


def sizes_of(config: DataConfig, steps: int) -> np.ndarray:
    return np.array(batch_sizes(config, steps))


def test_sizes_rise_evenly_with_the_tokens_and_then_stay(config: DataConfig) -> None:
    # 3 increments over 1,200 tokens of 10 each: one more after 400, 800 and 1,200
    four = ramped(config, 2, 2, 1200, sequence_length=10, batch_size=8)
    sizes = sizes_of(four, 80)
    before = np.concatenate([[0], np.cumsum(sizes)[:-1]]) * 10
    assert sizes.tolist() == [2 + 2 * min(3, tokens // 400) for tokens in before]
    assert sizes[0] == 2 and sizes[-1] == 8 and tokens_of(four, 80) == sizes.sum() * 10
    assert batch_sizes(config, 3) == [8, 8, 8]


def test_the_reports_batch_grows_over_its_first_469_billion_tokens(config: DataConfig) -> None:
    report = ramped(config, 3072, 1024, 469 * 10**9, sequence_length=4096, batch_size=15360)  # V3 §4.2
    sizes = sizes_of(report, 20_000)
    full = int(np.argmax(sizes == 15360))
    assert (
        sizes[0] == 3072 and (np.diff(sizes) >= 0).all() and tokens_of(report, full) == pytest.approx(469e9, rel=1e-3)
    )


def test_micro_batches_are_as_large_as_those_of_the_full_batch_or_a_little_smaller() -> None:
    on_256, on_2048 = Layout(15_360, 30, 256, 7), Layout(16_384, 2, 2048, 7)
    divided = [on_256.of_step(size) for size in (3072, 6144, 9216, 12_288, 15_360)]
    assert [(step.accumulate, step.micro_batch_size) for step in divided] == [(6 * n, 2) for n in range(1, 6)]
    divided = [on_2048.of_step(size) for size in (4096, 8192, 12_288, 16_384)]
    assert [(step.accumulate, step.micro_batch_size) for step in divided] == [(1, 2), (1, 4), (2, 3), (2, 4)]
    assert [micro_batches(samples, 4) for samples in range(1, 14)] == [1, 1, 1, 1, 5, 2, 7, 2, 3, 5, 11, 3, 13]
    with pytest.raises(ConfigError, match="^data.batch_ramp: a step of 3072 .* 2048 ranks; .* multiples of 2048$"):
        on_2048.of_step(3072)


def test_each_rank_draws_whole_steps_of_a_growing_batch(
    config: DataConfig, make_module: Callable[..., TextDataModule]
) -> None:
    """12 samples in 2 micro-batches of 3 at the end; before them 2, 4, .. 10 samples of 2 ranks."""
    growing = ramped(config, 2, 2, 96 * 90, batch_size=12)
    modules = [make_module(growing, max_steps=30, rank=rank, ranks=2, accumulate=2) for rank in range(2)]
    batches = [list(module.train_dataloader()) for module in modules]
    samples = order(np.arange(500), modules[0].train_samples, growing.seed).tolist()
    seen = []
    for step, size in enumerate(map(int, modules[0].batch_sizes)):
        number = modules[0].micro_batches(step)
        parts = [[of_rank.pop(0) for _ in range(number)] for of_rank in batches]
        for of_rank in parts:
            counted = sum((batch["targets"] != -100).sum((0, 2)) for batch in of_rank)
            assert torch.equal(of_rank[0]["target_counts"], counted)
            assert all(len(batch["sample_ids"]) == size / 2 / number <= 3 for batch in of_rank)
            assert all("target_counts" not in batch for batch in of_rank[1:])
        seen += [i for same in zip(*parts) for batch in same for i in batch["sample_ids"].tolist()]
    assert seen == samples[: len(seen)] and batches == [[], []]
    assert {modules[0].micro_batches(step) for step in range(31)} == {1, 2, 5}  # 5 samples on a rank: of one each
    assert len(modules[0].train_dataloader()) == 5 * 30  # Lightning's counts never reach it before the run's end


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_order_and_position_are_those_of_one_stream(
    config: DataConfig, make_module: Callable[..., TextDataModule], ranks: int, accumulate: int
) -> None:
    growing, steps, stop = ramped(config, 4, 4, 96 * 14), 8, 5
    sizes = sizes_of(growing, steps)
    assert sizes.tolist() == [4, 4, 4, 4, 8, 8, 8, 8]

    def modules(**arguments: Any) -> list[TextDataModule]:
        common = {"max_steps": steps, "ranks": ranks, "accumulate": accumulate}
        return [make_module(growing, rank=rank, **common, **arguments) for rank in range(ranks)]

    def drawn(modules: list[TextDataModule]) -> list[int]:
        batches = [[batch["sample_ids"].tolist() for batch in module.train_dataloader()] for module in modules]
        return [sample for same_time in zip(*batches, strict=True) for part in same_time for sample in part]

    first = modules()
    whole = drawn(first)
    expected = order(np.arange(sizes.sum()), first[0].train_samples, growing.seed).tolist()
    assert whole == expected
    first[0].trainer.global_step = stop  # type: ignore[misc, union-attr]
    state = first[0].state_dict()
    assert state["next_sample"] == sizes[:stop].sum() == first[0].tokens_before(stop) // 96
    assert drawn(modules(state=state, step=stop)) == expected[sizes[:stop].sum() :]


@pytest.mark.parametrize(
    ("ramp", "message"),
    [
        ((0, 2, 10), "data.batch_ramp.start=0: must be at least 1"),
        ((2, 0, 10), "data.batch_ramp.increment=0: must be at least 1"),
        ((8, 2, 10), "from start=8 by increment=2 never reaches data.batch_size=8"),
        ((2, 4, 10), "from start=2 by increment=4 never reaches data.batch_size=8"),
    ],
)
def test_a_ramp_that_does_not_arrive_is_refused(config: DataConfig, ramp: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ramped(config, *ramp)
