"""What is given to torch's scaled products, by a stand-in that checks layouts as torch does and multiplies in fp64."""

import pytest
import torch
import torch.nn.functional as F

from dsv3_lightning.model import fp8
from dsv3_lightning.model.devices import Device
from dsv3_lightning.model.fp8 import Form, emulated_product
from dsv3_lightning.model.fp8_cuda import refusal, scaled_product

pytestmark = pytest.mark.skipif(not hasattr(F, "scaled_mm"), reason="this torch has no scaled_mm")


def scaled_mm(a, b, scale_a, kind_a, scale_b, kind_b, output_dtype):
    """ScaledBlas.cpp, `_scaled_block1x128_block128x128` and `_scaled_block1x128_block1x128`."""
    (M, K), N = a.shape, b.shape[1]
    assert a.dtype == b.dtype == torch.float8_e4m3fn and scale_a.dtype == scale_b.dtype == torch.float32
    assert M % 16 == K % 128 == N % 16 == 0 and a.stride() == (K, 1) and b.stride() == (1, K)
    assert kind_a == F.ScalingType.BlockWise1x128
    blocks = K // 128
    assert scale_a.shape == (M, blocks) and scale_a.stride(0) == 1 and (blocks == 1 or scale_a.stride(1) == M)
    if kind_b == F.ScalingType.BlockWise128x128:
        up = -(-blocks // 4) * 4
        assert scale_b.shape == (up, N // 128)
        assert scale_b.stride(0) == 1 and (N == 128 or scale_b.stride(1) == up)
        wide_b = scale_b[:blocks].repeat_interleave(128, 0).repeat_interleave(128, 1)
    else:
        assert kind_b == F.ScalingType.BlockWise1x128
        assert scale_b.shape == (N, blocks) and scale_b.stride(0) == 1 and (blocks == 1 or scale_b.stride(1) == N)
        wide_b = scale_b.t().repeat_interleave(128, 0)
    wide_a = scale_a.repeat_interleave(128, 1)
    return ((a.double() * wide_a.double()) @ (b.double() * wide_b.double())).to(output_dtype)


@pytest.mark.parametrize("sizes", [(256, 384, 640), (5, 128, 128), (130, 200, 96), (128, 640, 128)])
def test_outputs_and_gradients_are_those_of_the_emulation(sizes, monkeypatch):
    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    rows, width, outputs = sizes
    generator = torch.Generator().manual_seed(0)
    found = []
    x, weight = torch.randn(rows, width, generator=generator), torch.randn(outputs, width, generator=generator)
    grad = torch.randn(rows, outputs, generator=generator)
    for multiply in (emulated_product, scaled_product):
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y = fp8.linear(Form(multiply), x, weight, torch.float32)
        y.backward(grad)
        found.append((y, x.grad, weight.grad))
    for wanted, got in zip(*found, strict=True):
        assert got.shape == wanted.shape and (got - wanted).norm() <= 4e-3 * wanted.norm()


@pytest.mark.parametrize(
    ("device", "cuda", "has", "reason"),
    [
        (Device("cuda", (9, 0), 90000), "12.9", True, None),
        (Device("cuda", (9, 0), 90000), "13.0", True, None),
        (Device("cuda", (9, 0), 90000), "12.8", True, "need CUDA 12.9 or newer, torch was built with 12.8"),
        (Device("cuda", (9, 0), 90000), "13.0", False, "this torch has no"),
        (Device("cuda", (8, 0), 90000), "13.0", True, "only, this is capability 8.0"),
        (Device("cuda", (10, 0), 90000), "13.0", True, "only, this is capability 10.0"),
        (Device("cpu"), None, True, "only, this is a cpu"),
    ],
)
def test_it_is_refused_where_torch_has_no_such_product(device, cuda, has, reason):
    found = refusal(device, cuda, has)
    assert found is None if reason is None else reason in found
