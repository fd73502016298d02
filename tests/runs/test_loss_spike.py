"""A planted spike: the run goes back, leaves the samples out and goes on; killed and resumed it does the same."""

import json

import pytest
import torch

from dsv3_lightning.callbacks.loss_spike import is_spike
from dsv3_lightning.data.batches.sampling import Layout, TrainSampler
from dsv3_lightning.data.batches.skips import shifted, skip_between
from tests.runs.test_steps import diary

SPIKE = (
    "callbacks.loss_spike={threshold: 10, window: 6, max_returns: 2}",
    "callbacks.spoil={class_path: tests.runs.poison.Spoil, init_args: {step: 11}}",
    "callbacks.diary={class_path: tests.runs.poison.Diary}",
    "callbacks.checkpoint.every_n_steps=4",
    "callbacks.checkpoint.keep=9",
    "trainer.max_steps=16",
    "data.batch_size=4",
    "trainer.val_check_interval=16",
    "trainer.limit_val_batches=1",
)


def returned(folder):
    return json.loads((folder / "returns.json").read_text())["returns"]


@pytest.fixture
def whole(nano, capsys):
    run = nano.run("whole", *SPIKE)
    assert run.code == 0
    return run, capsys.readouterr().out


def test_it_goes_back_leaves_the_samples_out_and_does_the_same_when_it_is_killed(nano, whole):
    run, output = whole
    assert output.count("at step 11 is a spike: going back to step 8") == 1
    assert "continuing after step 8" in output
    (record,) = returned(run.folder)
    assert (record["step"], record["back_to"], record["skips"]) == (11, 8, [[8 * 4, 3 * 4]])

    steps = [(entry["step"], entry["samples"]) for entry in diary(run) if "samples" in entry]
    assert [step for step, _ in steps] == [*range(1, 11), *range(9, 17)]  # step 11 ended before the diary's turn
    first, again = [set(samples) for _, samples in steps[:10]], [set(samples) for _, samples in steps[10:]]
    spoilt = set(json.loads((run.folder / "spoilt-0.json").read_text()))
    assert not any(samples & (first[8] | first[9] | spoilt) for samples in again)
    losses = dict(zip(*run.scalars()["loss/main"], strict=True))
    assert sorted(losses) == list(range(1, 17)) and max(losses.values()) < 10

    moments = "[[11, on_train_batch_start]]"
    raising = f"callbacks.raise={{class_path: tests.runs.poison.Raise, init_args: {{moments: {moments}}}}}"
    with pytest.raises(SystemExit):  # in the second life, before its first checkpoint
        nano.run("killed", *SPIKE, raising)
    killed = nano.run("killed", *SPIKE, raising)
    assert killed.code == 0 and returned(killed.folder) == returned(run.folder)
    for name, weight in run.weights(16).items():
        assert torch.equal(weight, killed.weights(16)[name]), name


def test_two_ranks_with_sharded_weights_agree(nano):
    """Both read their shards of the earlier checkpoint again, in the same processes."""
    run = nano.command("two", *SPIKE, "trainer.devices=2", "strategy={kind: fsdp2, sharded_checkpoints: true}")
    assert run.code == 0, run.output
    assert run.output.count("at step 11 is a spike: going back to step 8") == 1
    assert "continuing after step 8" in run.output and "strategy fsdp2" in run.output
    assert returned(run.folder)[0]["skips"] == [[32, 12]] and run.report()["steps"] == 16
    losses = dict(zip(*run.scalars()["loss/main"], strict=True))
    assert sorted(losses) == list(range(1, 17)) and max(losses.values()) < 10
    again = [[entry["samples"] for entry in diary(run, rank) if "samples" in entry][10:] for rank in range(2)]
    assert len(again[0]) == len(again[1]) == 8
    assert not {number for step in again[0] for number in step} & {number for step in again[1] for number in step}


def test_after_the_last_return_it_goes_on(nano, capsys):
    run = nano.run("limit", *SPIKE, "callbacks.loss_spike.max_returns=0", "trainer.max_steps=12")
    assert run.code == 0
    assert "step 11: loss" in (text := capsys.readouterr().out) and "is a spike; the run goes on, after 0 ret" in text
    assert not (run.folder / "returns.json").exists()


def test_the_order_is_that_of_a_run_without_the_samples_that_are_left_out():
    """Three steps of two samples are left out after the second step, and one more after the third of what remains."""
    layout = Layout(2)
    everything = [draw.samples.tolist() for draw in sampler(layout, 10, [])]
    skips = skip_between(skip_between([], 4, 10), 6, 8)
    found = [draw.samples.tolist() for draw in sampler(layout, 6, skips)]
    assert found == everything[:2] + everything[5:6] + everything[7:10]


def sampler(layout, steps, skips):
    return TrainSampler(64, layout, 1, steps, skips=skips)


def test_a_second_return_leaves_out_what_the_first_one_did_too():
    once = skip_between([], 40, 60)
    assert [shifted(position, once) for position in (39, 40)] == [39, 60]
    twice = skip_between(once, 40, 44)
    assert shifted(40, twice) == 64
    earlier = skip_between(twice, 20, 48)  # back to before both: on with what would have followed
    assert shifted(20, earlier) == shifted(48, twice) and shifted(19, earlier) == 19


def test_a_spike_stands_out_of_noise_upwards():
    losses = [2.0, 2.2, 1.9, 2.1, 2.0]
    assert not is_spike(2.3, losses, 6) and is_spike(3.0, losses, 6) and not is_spike(0.5, losses, 6)
    assert not is_spike(2.05, [2.0] * 5, 6) and is_spike(2.2, [2.0] * 5, 6)  # without any noise, from 6 % on
