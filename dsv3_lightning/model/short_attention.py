"""Causal attention of short sequences on a CPU, by two batched matrix products and a softmax.

torch's fused kernel for CPUs takes four times as long at 128 tokens and as long at 1,024. Here all T x T weights exist,
also those of later tokens, so time and memory grow with T squared. In bf16 the scores are rounded before the softmax.
"""

from typing import Any

import torch
from torch import Tensor

# The most tokens at which this is no slower than the fused kernel, measured with 4 heads of widths 48 and 32.
LONGEST = {torch.bfloat16: 512, torch.float32: 128}


def is_short(T: int, dtype: torch.dtype) -> bool:
    return T <= LONGEST.get(dtype, 0)


def short_attention(q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, scale: float, cu_seqlens: Tensor | None) -> Tensor:
    """softmax(q k^T · scale) v over earlier positions, of one's own document where their ends are given.

    cu_seqlens: where documents begin in the B·T tokens, and their end.
    """
    B, H, T, _ = q_BHTC.shape
    mask = hidden_positions(T, q_BHTC.dtype)
    if cu_seqlens is not None:
        number_BT = torch.bucketize(torch.arange(B * T), cu_seqlens.long(), right=True).view(B, T)
        others_BTT = number_BT[:, :, None] != number_BT[:, None]
        mask = mask.expand(B, T, T).masked_fill(others_BTT, -torch.inf).repeat_interleave(H, 0)
    q, k, v = (x.flatten(0, 1) for x in (q_BHTC, k_BHTC, v_BHTC))
    return ShortAttention.apply(q, k, v, mask.expand(B * H, T, T), scale).unflatten(0, (B, H))


def hidden_positions(T: int, dtype: torch.dtype) -> Tensor:
    """-inf where a position [row] does not see another [column] since it comes later, else 0: [T, T]."""
    return torch.full((T, T), -torch.inf, dtype=dtype).triu_(1)


class ShortAttention(torch.autograd.Function):
    """softmax(q k^T · scale + mask) v for q, k [N, T, C], v [N, T, C of v] and mask [N, T, T]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        weights = torch.baddbmm(mask, q, k.mT, alpha=scale).softmax(-1)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale = scale
        return weights @ v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        scores = torch._softmax_backward_data(grad @ v.mT, weights, -1, weights.dtype)
        return (scores @ k).mul_(ctx.scale), (scores.mT @ q).mul_(ctx.scale), weights.mT @ grad, None, None
