"""The first experts are crowded at the start, and only at the start."""

import pytest
import torch

from dsv3_lightning.callbacks import SkewedStart
from dsv3_lightning.errors import ConfigError

SKEWED = "callbacks.skewed_start={strength: 0.5}"
BIAS = "model.layers.1.mlp.gate.expert_bias"
SHORT = ("trainer.val_check_interval=20", "callbacks.checkpoint.every_n_steps=2")


def test_a_skewed_run_stays_so_without_balancing_and_leaves_with_a_bias(nano):
    words = (SKEWED, "trainer.max_steps=8", "trainer.val_check_interval=8", "loss.balance=none")
    left = nano.run("left", *words, "callbacks.expert_bias=null")
    helped = nano.run("helped", *words, "callbacks.expert_bias.speed=0.05")
    vio = {run.folder.name: run.scalars()["balance/max_vio"][1] for run in (left, helped)}
    ceiling = 16 / 4 - 1
    assert vio["left"][0] == vio["helped"][0] > ceiling - 0.05 and min(vio["left"]) > ceiling - 0.05
    assert min(vio["helped"]) < ceiling - 0.5


def test_a_run_that_resumes_is_not_skewed_again(nano):
    words = (SKEWED, *SHORT, "callbacks.expert_bias=null", "trainer.max_steps=4")
    first = nano.run("first", *words)
    second = nano.run("second", *words, f"run.resume={first.folder / 'checkpoints/step=2.ckpt'}")
    bias = second.weights(4)[BIAS]
    assert torch.equal(bias, first.weights(2)[BIAS]) and bias[0] == 0.5 and bias[-1] == 0.0


def test_no_strength_is_refused():
    with pytest.raises(ConfigError, match=r"callbacks.skewed_start.strength=0: must be above 0"):
        SkewedStart(0)
