"""Metrics against plain arithmetic, alone and over two ranks."""

import math

import pytest
import torch

from dsv3_lightning.training.metrics import BitsPerByte, MaxVio, TokenLoss, max_vio

RANKS = 2


def test_token_loss_is_the_mean_over_all_valid_targets_not_the_mean_of_means():
    targets = torch.full((2, 2, 4), 7)
    targets[0, 0, 1:] = -100  # main head: 1 + 4 valid; MTP head: 4 + 0
    targets[1, 1] = -100
    metric = TokenLoss(2)
    for sample, nll in zip(targets, ([3.0, 8.0], [4.0, 0.0])):
        metric.update(torch.tensor(nll), sample[None])
    torch.testing.assert_close(metric.compute(), torch.tensor([7 / 5, 8 / 4], dtype=torch.float64))


def test_token_loss_without_targets_is_nan_not_zero():
    metric = TokenLoss(1)
    metric.update(torch.zeros(1), torch.full((1, 1, 3), -100))
    assert math.isnan(metric.compute())


def test_bits_per_byte():
    metric = BitsPerByte()
    metric.update(torch.tensor(8 * math.log(2)), torch.tensor([3, 1]))
    metric.update(torch.tensor(4 * math.log(2)), torch.tensor([2]))
    assert float(metric.compute()) == pytest.approx(12 / 6)


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
    assert float(summed.compute()) == 7 / 4
