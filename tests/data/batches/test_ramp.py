"""A growing batch: sizes from their definition, and the same samples in the same order as ever."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dsv3_lightning.data.batches.module import TextDataModule
from dsv3_lightning.data.batches.ramp import batch_sizes, tokens_of
from dsv3_lightning.data.batches.sampling import Order
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
    expected = Order(first[0].train_samples, growing.seed)[0 : int(sizes.sum())].tolist()
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
