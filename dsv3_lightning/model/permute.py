"""Tokens sorted by expert and back, with gradients that are gathers.

Indexing's own backward pass would scatter, which is slow on a CPU and not deterministic on CUDA.
"""

from typing import Any

import torch
from torch import Tensor

from dsv3_lightning.model.autocast import compute_dtype


def permute(x_ND: Tensor, experts_NK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """A copy of each token for each of its experts, sorted by expert.

    Returns x_RD, the R = N·K routed tokens in the dtype of the matrix products (half the bytes then travel); order_R,
    int64: row r holds the copy with number n·K + k = order_R[r]; and counts_E, int64: the rows of each expert.
    """
    order_R = experts_NK.flatten().argsort(stable=True)
    counts_E = torch.bincount(experts_NK.flatten(), minlength=num_experts)
    return Permute.apply(x_ND.to(compute_dtype(x_ND)), order_R, experts_NK.shape[1]), order_R, counts_E


def unpermute(y_RD: Tensor, order_R: Tensor, gates_NK: Tensor) -> Tensor:
    """Σ_k gate · y for every token [N, D], from its K rows of y_RD, which `permute` has sorted by order_R."""
    y_NKD = Unpermute.apply(y_RD, order_R).unflatten(0, gates_NK.shape)
    return (gates_NK[:, None].to(y_NKD.dtype) @ y_NKD).squeeze(1)


class Permute(torch.autograd.Function):
    """Copies token n to the rows that hold the copies n·K … n·K + K-1 in the order order_R."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_R: Tensor, K: int) -> Tensor:
        ctx.save_for_backward(order_R)
        ctx.K = K
        return x_ND.index_select(0, order_R // K)  # on a CPU much faster than indexing

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        (order_R,) = ctx.saved_tensors
        return grad_RD.index_select(0, inverse(order_R)).unflatten(0, (-1, ctx.K)).sum(1), None, None


class Unpermute(torch.autograd.Function):
    """Undoes the sorting: row n·K + k of the result is the row of y_RD that holds this copy."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, order_R: Tensor) -> Tensor:
        ctx.save_for_backward(order_R)
        return y_RD.index_select(0, inverse(order_R))

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        (order_R,) = ctx.saved_tensors
        return grad_RD.index_select(0, order_R), None


def inverse(order_R: Tensor) -> Tensor:
    """The permutation that undoes order_R (int64)."""
    rows_R = torch.arange(len(order_R), device=order_R.device)
    return torch.empty_like(order_R).scatter_(0, order_R, rows_R)
