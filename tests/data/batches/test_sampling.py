"""One order, whoever draws it."""

import numpy as np
import pytest

from dsv3_lightning.data.batches.permutation import permuted
from dsv3_lightning.data.batches.sampling import Layout, MicroBatch, TrainSampler, ValidationSampler, order
from dsv3_lightning.errors import ConfigError


def micro_batches_of(
    samples: int, batch_size: int, accumulate: int, ranks: int, rank: int, steps: range
) -> list[MicroBatch]:
    layout = Layout(batch_size, accumulate, ranks, rank)
    first = {"first_step": steps.start, "first_sample": steps.start * batch_size}
    return list(TrainSampler(samples, layout, 5, steps.stop, **first))


def global_order(samples: int, batch_size: int, accumulate: int, ranks: int, steps: range) -> list[int]:
    """All samples in the order of step, micro-batch, rank."""
    by_rank = [micro_batches_of(samples, batch_size, accumulate, ranks, rank, steps) for rank in range(ranks)]
    return [int(sample) for same_time in zip(*by_rank) for micro_batch in same_time for sample in micro_batch.samples]


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    epochs = order(np.arange(250), 50, seed=3).reshape(5, 50)
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 5
    other = order(np.arange(250), 50, seed=4).reshape(5, 50)
    assert not any(np.array_equal(mine, theirs) for mine in epochs for theirs in other)


def test_the_order_is_a_function_of_the_number() -> None:
    whole = order(np.arange(100), 7, seed=3)
    numbers = np.array([[90, 99], [0, 3], [13, 14]])  # across epochs, backwards
    assert np.array_equal(order(numbers, 7, seed=3), whole[numbers])


@pytest.mark.parametrize(("accumulate", "ranks"), [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (4, 1), (2, 4)])
def test_ranks_and_micro_batches_share_one_order(accumulate: int, ranks: int) -> None:
    # 8 samples a step, 11 in the epoch: no epoch ends with a step
    assert global_order(11, 8, accumulate, ranks, range(6)) == global_order(11, 8, 1, 1, range(6))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_later_start_resumes_where_it_would_have_been(ranks: int) -> None:
    whole = global_order(16, 8, 1, 1, range(10))
    for step in (0, 1, 2, 3, 10):  # in mid-epoch, at an epoch's end, at the run's end
        assert global_order(16, 8, 1, ranks, range(step, 10)) == whole[step * 8 :]


def test_a_steps_first_micro_batch_names_all_samples_of_its_rank() -> None:
    for rank in range(2):
        micro_batches = micro_batches_of(11, 8, 2, 2, rank, range(4))
        for first, second in zip(micro_batches[::2], micro_batches[1::2], strict=True):
            assert first.step_samples is not None and second.step_samples is None
            assert first.step_samples.tolist() == [*first.samples, *second.samples]


def test_the_length_is_that_of_the_whole_run() -> None:
    sampler = TrainSampler(11, Layout(8, 4), 5, 10, first_step=6, first_sample=48)
    assert len(sampler) == 40 and len(list(sampler)) == 16


def test_a_step_may_hold_several_epochs() -> None:
    (micro_batch,) = micro_batches_of(3, 8, 1, 1, 0, range(1))
    assert sorted(micro_batch.samples[:3]) == sorted(micro_batch.samples[3:6]) == [0, 1, 2]
    assert micro_batch.step_samples is not None and micro_batch.step_samples.tolist() == micro_batch.samples.tolist()


@pytest.mark.parametrize(("batch_size", "nearest"), [(16, "12 or 18"), (4, "6"), (13, "12 or 18"), (1, "6")])
def test_a_batch_that_cannot_be_dealt_out_is_refused(batch_size: int, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"^data.batch_size={batch_size}: 2 ranks .* of 6, such as {nearest}$"):
        Layout(batch_size, accumulate=3, ranks=2)


@pytest.mark.parametrize("samples", [1, 3, 4, 8, 9, 21])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_validation_draws_each_sample_once_and_equally_often(samples: int, ranks: int) -> None:
    by_rank = [list(ValidationSampler(samples, Layout(8, 1, ranks, rank))) for rank in range(ranks)]
    assert {len(of_rank) for of_rank in by_rank} == {-(-samples // 8)}
    for rank, of_rank in enumerate(by_rank):
        drawn = np.concatenate([micro_batch.samples for micro_batch in of_rank])
        assert drawn[drawn >= 0].tolist() == permuted(np.arange(samples), samples, 0, 0)[rank::ranks].tolist()
        assert {len(micro_batch.samples) for micro_batch in of_rank} == {8 // ranks}


def test_a_part_of_the_validation_is_of_all_documents() -> None:
    micro_batches = list(ValidationSampler(1000, Layout(10)))
    drawn = np.concatenate([micro_batch.samples for micro_batch in micro_batches])
    assert sorted(drawn) == list(range(1000))
    first_tenth = np.bincount(drawn[:100] // 100, minlength=10)  # in order, all would lie in the first tenth
    assert first_tenth.min() >= 3
