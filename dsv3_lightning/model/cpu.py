"""What the model does for CPUs only."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._guards import active_fake_mode

MAX_LOGITS = 2**27  # logits that exist in fp32 at a time: 512 MiB
LOSS_PRODUCT = 4096  # fewest tokens of a product with the head, whose gradient is read and written once per product
MAX_LOGITS_CPU = 2**20  # 4 MiB, so that they stay in the cache
# oneDNN compiles a program for every new shape of a bf16 product, which takes longer than running it. The numbers of
# tokens per expert are new in every step; their multiples of 16 are few.
ROW_MULTIPLE_CPU = 16


class LossChunks(NamedTuple):
    """Numbers of tokens that the loss takes at a time: in a product with the head, and in a softmax in fp32."""

    product: int
    softmax: int


def loss_chunks(device_type: str, vocab_size: int) -> LossChunks:
    """Large products for GPUs, whose softmax is done in parts of MAX_LOGITS; one small size for both on CPUs.

    >>> loss_chunks("cuda", 129280)
    LossChunks(product=4096, softmax=1038)
    """
    if device_type == "cpu":
        return LossChunks(*[max(1, MAX_LOGITS_CPU // vocab_size)] * 2)
    softmax = max(1, MAX_LOGITS // vocab_size)
    return LossChunks(max(softmax, LOSS_PRODUCT), softmax)


def on_cpu(x: Tensor) -> bool:
    """Whether a CPU computes x. Fake tensors, as of a dry run, stand for those of a GPU."""
    return x.device.type == "cpu" and active_fake_mode() is None


def row_multiple(x: Tensor) -> int:
    """The number to a multiple of which each expert's rows are padded; 1 where shapes cost nothing."""
    return ROW_MULTIPLE_CPU if x.dtype == torch.bfloat16 and on_cpu(x) else 1


def padded_rows(offsets_E: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Where each row goes when every expert's rows are filled up to a multiple, and the new offsets, [E].

    >>> padded_rows(torch.tensor([1, 1, 4]), 2)
    (tensor([0, 2, 3, 4]), tensor([2, 2, 6]))
    """
    counts_E = offsets_E.diff(prepend=offsets_E.new_zeros(1))
    padded_E = (counts_E + multiple - 1) // multiple * multiple
    new_offsets_E = padded_E.cumsum(0)
    shift_E = new_offsets_E - padded_E - (offsets_E - counts_E)
    return torch.arange(int(offsets_E[-1])) + shift_E.repeat_interleave(counts_E), new_offsets_E
