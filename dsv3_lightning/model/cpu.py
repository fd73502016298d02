"""What the model does for the sake of CPUs, beside what GPUs need as well.

Every function takes its size as an argument; None chooses it by the device that computes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_LOGITS = 2**27  # logits that exist at a time: 512 MiB in fp32
MAX_LOGITS_CPU = 2**20  # 4 MiB, so that they stay in the cache
# oneDNN compiles a program for every new shape of a bf16 product, which takes longer than running it. The numbers of
# tokens per expert are new in every step; their multiples of 16 are few.
ROW_MULTIPLE_CPU = 16


def max_logits(device: torch.device, chosen: int | None) -> int:
    """How many logits may exist at a time."""
    if chosen is not None:
        return chosen
    return MAX_LOGITS_CPU if device.type == "cpu" else MAX_LOGITS


def row_multiple(x: Tensor, chosen: int | None) -> int:
    """The number to a multiple of which each expert's rows are padded; 1 where shapes cost nothing."""
    if chosen is not None:
        return chosen
    return ROW_MULTIPLE_CPU if x.dtype == torch.bfloat16 and x.device.type == "cpu" else 1


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


def pad_to_one_width(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Zeros after the last dim of the narrower ones: with unequal widths scaled_dot_product_attention leaves its fast
    path on CPUs."""
    width = max(x.shape[-1] for x in tensors)
    return tuple(F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in tensors)
