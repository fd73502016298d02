"""A step that isn't finite is put down to a rank, a parameter and samples."""

import torch
from torch import nn

from dsv3_lightning.training.non_finite import Finding, describe, find_on_rank


def loss(value, *samples):
    return torch.tensor(value), torch.tensor(samples)


def test_a_micro_batch_with_an_infinite_loss_is_named_alone():
    found = find_on_rank(3, [], [loss(2.0, 1, 2), loss(torch.nan, 5, -1), loss(torch.inf, 9)])
    assert found == Finding(3, True, [], [5, 9])  # -1 is a row without a sample
    assert describe([Finding(0, False, ["w"], [7]), found]) == "rank 3: loss of samples 5, 9"


def test_a_gradient_is_named_by_its_parameter_and_the_samples_of_the_step():
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    for name in ("first", "second"):
        for parameter in model[name].parameters():
            parameter.grad = torch.zeros_like(parameter)
    model["second"].weight.grad[1, 0] = torch.inf
    found = find_on_rank(0, model.named_parameters(), [loss(2.0, 1, 2), loss(3.0, 4)])
    assert found == Finding(0, False, ["second.weight"], [1, 2, 4])
    assert describe([found]) == "rank 0: gradient of second.weight, samples 1, 2, 4"


def test_many_samples_and_ranks_stay_one_line():
    found = [Finding(rank, False, ["w", "v"], list(range(100))) for rank in range(2048)]
    assert describe(found) == (
        "rank 0: gradient of w and 1 more, samples 0, 1, 2, 3, 4, 5, 6, 7 and 92 more; "
        "rank 1: gradient of w and 1 more, samples 0, 1, 2, 3, 4, 5, 6, 7 and 92 more; the same on 2046 more ranks"
    )


def test_a_norm_that_overflows_while_every_part_is_finite_is_said():
    assert describe([Finding(0, False, [], [1])]) == "only the norm over all gradients overflowed"
