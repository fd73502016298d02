"""Which kernel attention takes, and that documents of one sample do not see each other, as a mask would have it."""

from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from dsv3_lightning.model import attention_kernels
from dsv3_lightning.model.attention_kernels import (
    causal_attention,
    choose_kernel,
    describe_kernel,
    find_documents,
    variable_lengths,
)
from dsv3_lightning.model.devices import Device

BF16, FP32 = torch.bfloat16, torch.float32
CPU, A100, ADA, BLACKWELL_PC = Device("cpu"), Device("cuda", (8, 0), 91800), Device("cuda", (8, 9), 91800), Device(
    "cuda", (12, 0), 91800
)  # fmt: skip
H100, B200 = Device("cuda", (9, 0), 91800), Device("cuda", (10, 0), 91800)


@pytest.mark.parametrize(
    ("device", "qk", "v", "dtype", "T", "documents", "name", "width"),
    [
        (CPU, 48, 32, FP32, 4096, False, "flash", 48),
        (CPU, 48, 32, BF16, 4096, True, "flash", 48),
        (CPU, 48, 32, FP32, 128, False, "batched products", None),
        (CPU, 48, 32, BF16, 512, True, "batched products", None),
        (CPU, 48, 32, torch.float64, 128, False, "flash", 48),
        (A100, 192, 128, BF16, 4096, False, "flash", 192),  # FlashAttention wants equal widths
        (A100, 192, 128, FP32, 4096, False, "efficient", None),  # the only fused kernel of fp32
        (A100, 320, 128, BF16, 4096, False, "efficient", None),
        (ADA, 192, 128, BF16, 4096, False, "flash", 192),
        (ADA, 208, 128, BF16, 4096, False, "efficient", None),  # no backward pass between 193 and 224 there
        (BLACKWELL_PC, 224, 128, BF16, 4096, False, "efficient", None),
        (BLACKWELL_PC, 256, 128, BF16, 4096, False, "flash", 256),
        (H100, 192, 128, BF16, 4096, False, "cuDNN", None),
        (H100, 128, 128, BF16, 4096, False, "cuDNN", None),
        (H100, 96, 64, BF16, 4096, False, "cuDNN", None),
        (H100, 192, 192, BF16, 4096, False, "flash", 192),  # cuDNN takes 192 beside 128 only
        (H100, 192, 96, BF16, 4096, False, "flash", 192),
        (H100, 60, 64, BF16, 4096, False, "flash", 64),  # cuDNN wants multiples of 8
        (H100, 192, 128, BF16, 1, False, "flash", 192),
        (H100._replace(cudnn=91002), 192, 128, BF16, 4096, False, "flash", 192),
        (H100._replace(cudnn=91002), 128, 128, BF16, 4096, False, "cuDNN", None),
        (H100._replace(cudnn=91500), 192, 128, BF16, 4000, False, "flash", 192),
        (H100._replace(cudnn=91500), 192, 128, BF16, 4096, False, "cuDNN", None),
        (H100._replace(cudnn=0), 128, 128, BF16, 4096, False, "flash", 128),
        (B200, 192, 128, BF16, 4000, False, "cuDNN", None),
        (H100, 192, 128, FP32, 4096, False, "efficient", None),
        (H100, 192, 128, BF16, 4096, True, "flash, variable lengths", 192),
        (A100, 18, 6, BF16, 4096, True, "flash, variable lengths", 24),
        (A100, 320, 128, BF16, 4096, True, "efficient", None),
        (A100, 192, 128, FP32, 4096, True, "efficient", None),
        (Device("cuda", (7, 5), 91800), 192, 128, BF16, 4096, True, "torch's own", 192),
        (Device("mps"), 192, 128, FP32, 4096, False, "torch's own", 192),
    ],
)
def test_the_kernel_follows_from_device_widths_dtype_and_length(device, qk, v, dtype, T, documents, name, width):
    kernel = choose_kernel(device, qk, v, dtype, T, documents)
    assert (kernel.name, kernel.width) == (name, width)
    assert kernel.varlen == ("variable" in name)
    if kernel.backends:  # whatever the preferred ones refuse, there is one that takes it
        assert kernel.backends[-1] == SDPBackend.MATH


def test_the_choice_is_told_in_one_line():
    kernel = choose_kernel(H100, 192, 128, BF16, 4096, False)
    assert describe_kernel(kernel, H100, 192, 128, BF16) == (
        "attention: cuDNN on compute capability 9.0, bfloat16, widths 192 and 128"
    )


PADDING = -1
SAMPLES = {
    "uneven": [[7, 7, 7, 9, 9, 12, 12, 12, 12, 12, PADDING, PADDING], [3] * 6 + [5] * 6],
    "one token each": [list(range(12)), list(range(12, 24))],
    "one document, and padding alone": [[4] * 12, [PADDING] * 12],
    "one is whole, the other is not": [[4] * 12, [5] + [6] * 11],
    "the same number ends one sample and begins the next": [[1] * 6 + [2] * 6, [2] * 3 + [3] * 9],
    "a single sample": [[1] * 3 + [2] * 8 + [PADDING]],
}


def masked_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, documents_BT: Tensor) -> Tensor:
    """The definition, with a mask of [B, 1, T, T]."""
    T = documents_BT.shape[1]
    seen = (documents_BT[:, None, :, None] == documents_BT[:, None, None, :]) & torch.ones(T, T).tril().bool()
    return (q @ k.mT * scale).masked_fill(~seen, -torch.inf).softmax(-1) @ v


def queries_keys_values(B: int, T: int, dtype: torch.dtype, widths=(10, 6)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (widths[0], widths[0], widths[1])
    return [torch.randn(B, 3, T, C, generator=generator).to(dtype).requires_grad_() for C in sizes]


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float64])  # the last by torch's fused kernel
@pytest.mark.parametrize("name", SAMPLES)
def test_attention_of_documents_is_that_with_a_mask(name, dtype):
    documents_BT = torch.tensor(SAMPLES[name])
    inputs = queries_keys_values(*documents_BT.shape, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = masked_attention(*exact, 0.7, documents_BT)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * weights).sum().backward()
    found = causal_attention(*inputs, 0.7, find_documents(documents_BT, torch.device("cpu")))
    (found * weights).sum().backward()
    tolerance = {"rtol": 0.03, "atol": 0.03} if dtype == BF16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found.double(), expected, **tolerance)
    for x, y in zip(inputs, exact, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, **tolerance)


@pytest.mark.parametrize("name", SAMPLES)
def test_lengths_and_ends_of_documents(name):
    documents = find_documents(torch.tensor(SAMPLES[name]), torch.device("cpu"))
    by_hand = {
        "uneven": ([[3, 2, 5, 2], [6, 6]], [0, 3, 5, 10, 12, 18, 24], 6),
        "one token each": ([[1] * 12, [1] * 12], list(range(25)), 1),
        "one is whole, the other is not": ([[12], [1, 11]], [0, 12, 13, 24], 12),
        "the same number ends one sample and begins the next": ([[6, 6], [3, 9]], [0, 6, 12, 15, 24], 9),
        "a single sample": ([[3, 8, 1]], [0, 3, 11, 12], 8),
    }
    if name not in by_hand:
        assert documents is None  # nothing to tell apart
        return
    assert (documents.lengths, documents.cu_seqlens.tolist(), documents.longest) == by_hand[name]
    assert documents.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize("name", ["uneven", "one token each", "a single sample"])
def test_the_kernel_of_variable_lengths_gets_every_document_of_every_sample(name):
    """FlashAttention runs on CUDA alone; a stand-in with its interface takes its place here."""

    def stand_in(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
        lengths = cu_seq_q.diff().tolist()
        assert window_size == (-1, 0) and max_q == max_k == max(lengths) and cu_seq_q is cu_seq_k
        parts = zip(*(x.transpose(0, 1).split(lengths, 1) for x in (q, k, v)))  # [H, T, C]
        return torch.cat(
            [masked_attention(*part, scale, torch.zeros(1, part[0].shape[1]))[0] for part in parts], 1
        ).transpose(0, 1)

    documents_BT = torch.tensor(SAMPLES[name])
    q, k, v = queries_keys_values(*documents_BT.shape, FP32, widths=(8, 8))
    with mock.patch.object(attention_kernels, "varlen_attn", stand_in):
        found = variable_lengths(q, k, v, 0.7, find_documents(documents_BT, torch.device("cpu")))
    torch.testing.assert_close(found, masked_attention(q, k, v, 0.7, documents_BT), rtol=1e-5, atol=1e-5)
