"""Metrics against plain arithmetic, alone and over two ranks."""

import math
from types import SimpleNamespace

import pytest
import torch

from dsv3_lightning.training.logging import latest_scalars, log_scalars
from dsv3_lightning.training.metrics import Acceptance, BitsPerByte, MaxVio, TokenLoss, max_vio

RANKS = 2


def test_token_loss_is_the_mean_over_all_valid_targets_not_the_mean_of_means():
    targets = torch.full((2, 2, 4), 7)
    targets[0, 0, 1:] = -100  # main head: 1 + 4 valid; MTP head: 4 + 0
    targets[1, 1] = -100
    metric = TokenLoss(2)
    for sample, nll in zip(targets, ([3.0, 8.0], [4.0, 0.0])):
        metric.update(torch.tensor(nll), sample[None])
    assert metric.compute() == [7 / 5, 8 / 4]


def test_a_mean_over_nothing_is_absent_not_zero_and_no_nan():
    loss, bits, accepted = TokenLoss(2), BitsPerByte(), Acceptance(2)
    targets = torch.full((1, 3, 3), -100)
    loss.update(torch.tensor([0.0, 3.0]), torch.tensor([[[-100, -100], [-100, 1]]]))
    bits.update(torch.tensor(0.0), torch.tensor([0]))
    accepted.update(torch.ones(1, 3, 3, dtype=torch.int64), targets)
    assert loss.compute() == [None, 3.0] and bits.compute() is None and accepted.compute() == [None, None]


def test_what_is_absent_has_no_point_and_no_latest_value():
    points = []
    logger = SimpleNamespace(log_metrics=lambda values, step: points.append((step, values)))
    trainer = SimpleNamespace(
        loggers=[logger], lightning_module=SimpleNamespace(), global_step=3,
        callback_metrics={}, logged_metrics={}, progress_bar_metrics={},
    )  # fmt: skip
    log_scalars(trainer, {"loss/main": 2.0, "optimizer/lr": 0.1})
    log_scalars(trainer, {"loss/main": None, "optimizer/lr": 0.2}, 4)
    log_scalars(trainer, {"val/loss": None})
    assert points == [(3, {"loss/main": 2.0, "optimizer/lr": 0.1}), (4, {"optimizer/lr": 0.2})]
    assert latest_scalars(trainer) == {"optimizer/lr": 0.2} and "val/loss" not in trainer.callback_metrics


def test_bits_per_byte():
    metric = BitsPerByte()
    metric.update(torch.tensor(8 * math.log(2)), torch.tensor([3, 1]))
    metric.update(torch.tensor(4 * math.log(2)), torch.tensor([2]))
    assert metric.compute() == pytest.approx(12 / 6)


def test_max_vio_counts_exactly_where_fp32_could_not():
    metric = MaxVio(1, 2)
    metric.update(torch.tensor([[2**24, 2**24]]))
    for _ in range(3):
        metric.update(torch.tensor([[1, 0]]))  # in fp32, 2^24 + 1 is 2^24
    assert metric.counts_LE.tolist() == [[2**24 + 3, 2**24]]
    assert float(metric.compute()) == pytest.approx(1.5 / (2**24 + 1.5), rel=1e-12)


def test_max_vio_by_hand():
    counts = torch.tensor([[2, 1, 1, 0], [5, 5, 5, 5], [0, 0, 0, 8], [0, 0, 0, 0]])
    assert max_vio(counts).tolist() == [1.0, 0.0, 3.0, 0.0]


def test_states_are_summed_over_ranks():
    """What torchmetrics does to the states of two ranks, on the numbers of one."""
    ranks = [TokenLoss(1) for _ in range(RANKS)]
    ranks[0].update(torch.tensor([6.0]), torch.tensor([[[1, 2, 3]]]))
    ranks[1].update(torch.tensor([1.0]), torch.tensor([[[1, -100, -100]]]))
    assert all(
        reduction is torch.sum or reduction.__name__ == "dim_zero_sum" for reduction in ranks[0]._reductions.values()
    )
    summed = TokenLoss(1)
    summed.nll_P = sum(rank.nll_P for rank in ranks)
    summed.count_P = sum(rank.count_P for rank in ranks)
    assert summed.compute() == [7 / 4]
