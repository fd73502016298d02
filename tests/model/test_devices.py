"""What is known about GPUs: where grouped products loop over experts, and where empty experts get wrong gradients."""

from unittest import mock

import pytest
import torch

from dsv3_lightning.model import devices
from dsv3_lightning.model.devices import (
    Device,
    device_of,
    empty_experts_get_gradients,
    grouped_products_loop,
    zero_gradients_of_empty,
)
from dsv3_lightning.model.experts import grouped_linear
from dsv3_lightning.training.hardware import hardware_lines

from .small import small_config

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("capability", "dtype", "loops", "wrong"),
    [
        ((8, 0), BF16, True, False),
        ((8, 9), BF16, True, False),
        ((9, 0), BF16, False, False),
        ((9, 0), FP32, True, False),
        ((10, 0), BF16, False, True),
        ((10, 3), BF16, False, True),
        ((12, 0), BF16, True, False),
        ((0, 0), FP32, False, False),
    ],
)
def test_slow_and_wrong_grouped_products_are_known_by_the_capability(capability, dtype, loops, wrong):
    device = Device("cuda" if capability[0] else "cpu", capability)
    assert grouped_products_loop(device, dtype) == loops
    assert empty_experts_get_gradients(device) == wrong


def test_a_cpu_has_no_capability():
    assert device_of(torch.device("cpu")) == Device("cpu", (0, 0), 0)


def test_the_gradient_of_an_empty_expert_is_zero_even_if_it_comes_back_as_nan():
    offsets_E = torch.tensor([0, 2, 2, 7, 7])  # the first, the third and the last have no tokens
    coming = torch.randn(5, 3, 2)
    coming[[0, 2, 4]] = torch.nan
    with mock.patch.object(devices, "device_of", return_value=Device("cuda", (10, 0))):
        masked = zero_gradients_of_empty(coming, offsets_E)
    assert torch.equal(masked[[1, 3]], coming[[1, 3]])
    assert torch.equal(masked[[0, 2, 4]], torch.zeros(3, 3, 2))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_products_of_experts_and_other_gradients_are_the_same_with_the_mask(dtype):
    offsets_E = torch.tensor([0, 3, 3, 8])
    found = []
    for device in (Device("cpu"), Device("cuda", (10, 0))):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(8, 16, generator=generator).to(dtype).requires_grad_()
        weight = torch.randn(4, 16, 8, generator=generator).requires_grad_()
        with mock.patch.object(devices, "device_of", return_value=device):
            out = grouped_linear(x, weight, offsets_E)
            out.float().square().sum().backward()
        found.append((out, x.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("capability", "precision", "isolate", "lines"),
    [
        ((9, 0), "bf16", False, ["attention: flash on compute capability 9.0, bfloat16, widths 18 and 6 padded to 18"]),
        (
            (8, 0),
            "bf16-mixed",
            True,
            [
                "attention: flash, variable lengths on compute capability 8.0, bfloat16, widths 18 and 6 padded to 24",
                "experts: bfloat16 on compute capability 8.0 has no grouped product; "
                "each expert has its own, and each layer waits for the GPU",
            ],
        ),
        (
            (10, 0),
            "bf16",
            False,
            [
                "attention: flash on compute capability 10.0, bfloat16, widths 18 and 6 padded to 18",
                "experts: gradients of experts without tokens are masked, since compute capability 10.0 "
                "gets them wrong (pytorch#172439)",
            ],
        ),
        ((0, 0), "32", False, ["attention: flash on cpu, float32, widths 18 and 6 padded to 18"]),
    ],
)
def test_a_run_starts_by_saying_what_its_device_does(capability, precision, isolate, lines):
    device = Device("cuda" if capability[0] else "cpu", capability, 91800)
    assert hardware_lines(small_config(), device, precision, 4096, isolate) == lines


def test_a_model_without_experts_says_nothing_of_them():
    config = small_config(first_k_dense_replace=3)
    assert len(hardware_lines(config, Device("cuda", (8, 0)), "bf16", 4096, False)) == 1
