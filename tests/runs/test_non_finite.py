"""A gradient that isn't finite, on one rank, in one micro-batch, between two logged steps (pytorch/torchtitan#4226)."""

import math
import re
import socket

import pytest
import torch

from tests.runs.test_steps import diary

POISON = (
    "callbacks.poison={{class_path: tests.runs.poison.Poison, "
    "init_args: {{rank: {rank}, step: {step}, onwards: {onwards}}}}}"
)
SLEEPY = (
    "callbacks.sleepy={class_path: tests.runs.poison.Sleepy, init_args: {rank: 1, every: 20, seconds: 0.5}}",
    "callbacks.throughput.straggler=3",
)
DIARY = "callbacks.diary={class_path: tests.runs.poison.Diary}"
TWO = ("trainer.devices=2", "trainer.accumulate_grad_batches=4", "trainer.log_every_n_steps=5")


def everything_finite(checkpoint):
    state = torch.load(checkpoint, weights_only=True)
    tensors = [*state["state_dict"].values()]
    for moments in state["optimizer_states"][0]["state"].values():
        tensors += [value for value in moments.values() if torch.is_tensor(value)]
    return all(torch.isfinite(tensor).all() for tensor in tensors)


def test_the_step_is_skipped_on_both_ranks_and_counted_once(nano):
    run = nano.command("once", *TWO, *SLEEPY, DIARY, POISON.format(rank=1, step=7, onwards="false"))
    assert run.code == 0, run.output
    # In logged steps rank 1 is late before its forward pass, and rank 0 waits for it: both need the same wall time.
    late = re.findall(r"^step (\d+): rank 1 \((.+)\) is slow: by itself it needs", run.output, re.MULTILINE)
    assert late == [(step, socket.gethostname()) for step in ("5", "10", "15", "20")], run.output
    assert "rank 0 (" not in run.output
    curves = run.scalars()
    assert curves["throughput/slowest_rank"] == ([5, 10, 15, 20], [1.0] * 4)
    assert all(value >= 4 * 0.5 for value in curves["throughput/step_seconds_max"][1])
    assert all(value > 0 for value in curves["throughput/step_seconds_min"][1])
    assert run.output.count("step 8: the loss or a gradient is not finite; step skipped") == 1
    # rank 1's four micro-batches of step 8 are named by their samples, as the run's diary has them
    (line,) = [line for line in run.output.splitlines() if line.startswith("step 8: the loss")]
    name, samples = re.search(r"; rank 1: gradient of (\S+), samples ([\d, ]+)$", line).groups()
    (drawn,) = [entry["samples"] for entry in diary(run, 1) if entry["step"] == 8]
    assert name == "model.embed_tokens.weight" and [int(number) for number in samples.split(", ")] == drawn
    assert run.report()["skipped_steps"] == 1 and math.isfinite(run.report()["val_loss"])
    assert everything_finite(run.folder / "checkpoints/step=20.ckpt")
    # DDP keeps no promise that ranks stay equal once their gradients differ: equal numbers of a clean continuation do
    state = torch.load(run.folder / "checkpoints/step=20.ckpt", weights_only=True)
    assert {moments["step"].item() for moments in state["optimizer_states"][0]["state"].values()} == {19.0}


@pytest.mark.parametrize("step", [0, 12])
def test_without_end_the_run_stops_with_one_line_and_a_finite_checkpoint(nano, step):
    arguments = (POISON.format(rank=0, step=step, onwards="true"), "optimizer.max_skipped_steps=3")
    run = nano.command("endless", *arguments, "callbacks.checkpoint.every_n_steps=4")
    assert run.code == 1 and "Traceback" not in run.output
    assert f"step {step + 3}: the loss or a gradient was not finite 3 steps in a row" in run.output
    assert run.output.count("; at last rank 0: gradient of model.embed_tokens.weight, samples ") == 1
    for checkpoint in (run.folder / "checkpoints").glob("step=*.ckpt"):
        assert everything_finite(checkpoint)


def test_a_skipped_step_leaves_weights_moments_and_bias_alone(nano):
    every = ("callbacks.checkpoint.every_n_steps=1", "callbacks.checkpoint.keep=99", "trainer.max_steps=6")
    run = nano.run("six", *every, POISON.format(rank=0, step=3, onwards="false"))
    third, fourth, fifth = (run.weights(step) for step in (3, 4, 5))
    assert all(torch.equal(fourth[name], value) for name, value in third.items())
    assert not any(torch.equal(fifth[name], value) for name, value in fourth.items() if name.endswith("weight"))
