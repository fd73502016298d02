"""Tokens sorted by expert and back, with gradients that are gathers.

Indexing's own backward pass would scatter, which is slow on a CPU and not deterministic on CUDA.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Order(NamedTuple):
    """The order that sorts the N·K copies of N tokens by expert.

    order_R: int64 [N·K], row r holds the copy with number n·K + k = order_R[r]; copies for no expert come last.
    rows_NK: int64, the row of each copy, or -1 for one without an expert. counts_E: int64, the rows of each expert.
    """

    order_R: Tensor
    rows_NK: Tensor
    counts_E: Tensor


def sort_by_expert(experts_NK: Tensor, num_experts: int) -> Order:
    """The order of the copies whose experts are experts_NK, int64; -1 for no expert. Waits for no device."""
    keys_NK = experts_NK % (num_experts + 1)  # -1 becomes the largest
    order_R = keys_NK.flatten().int().argsort(stable=True)  # half the bits to sort
    rows_NK = inverse(order_R).view_as(experts_NK).masked_fill(experts_NK < 0, -1)
    return Order(order_R, rows_NK, count(keys_NK, num_experts + 1)[:-1])


def count(keys: Tensor, different: int) -> Tensor:
    """How often each of the numbers below `different` is among the keys: int64 [different]."""
    return keys.new_zeros(different).scatter_add_(0, keys.flatten(), torch.ones_like(keys).flatten())


def inverse(order_R: Tensor) -> Tensor:
    """The permutation that undoes order_R (int64)."""
    rows_R = torch.arange(len(order_R), device=order_R.device)
    return torch.empty_like(order_R).scatter_(0, order_R, rows_R)


def sum_of_rows(x_RD: Tensor, rows_NK: Tensor, gates_NK: Tensor | None = None) -> Tensor:
    """Σ_k gate · x over the rows rows_NK of x_RD: [N, D], in fp32 or what is wider; a row -1 adds nothing.

    Without gates these are 1. Tokens without any row get 0, whatever x_RD holds.
    """
    there_NK = rows_NK >= 0
    weights_NK = (there_NK if gates_NK is None else gates_NK.where(there_NK, 0)).to(wide(x_RD))
    out_ND = weights_NK.new_zeros(len(rows_NK), x_RD.shape[1])
    if len(x_RD) == 0:
        return out_ND
    for row_N, weight_N in zip(rows_NK.clamp(min=0).unbind(1), weights_NK.unbind(1)):
        out_ND.addcmul_(x_RD.index_select(0, row_N), weight_N[:, None])  # on a CPU much faster than indexing
    return out_ND.masked_fill_(~there_NK.any(1, keepdim=True), 0)  # 0 times what is not finite is not 0


def wide(x: Tensor) -> torch.dtype:
    """The dtype of sums of x: fp32, or wider."""
    return torch.promote_types(x.dtype, torch.float32)


class Permute(torch.autograd.Function):
    """The tokens x_ND in the order of their copies, [R, D]: as many rows as order_R has."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_R: Tensor, rows_NK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_NK)
        return x_ND.index_select(0, order_R // rows_NK.shape[1])

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        (rows_NK,) = ctx.saved_tensors
        return sum_of_rows(grad_RD, rows_NK).to(grad_RD.dtype), None, None


class WeightedUnpermute(torch.autograd.Function):
    """Σ_k gate · y for every token, [N, D] in y's dtype, computed in fp32, from the rows that `Permute` has sorted."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, gates_NK: Tensor, order_R: Tensor, rows_NK: Tensor) -> Tensor:
        ctx.save_for_backward(y_RD, gates_NK, order_R, rows_NK)
        return sum_of_rows(y_RD, rows_NK, gates_NK).to(y_RD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        y_RD, gates_NK, order_R, rows_NK = ctx.saved_tensors
        gates_R = gates_NK.where(rows_NK >= 0, 0).flatten().index_select(0, order_R[: len(y_RD)])
        tokens_R = order_R[: len(y_RD)] // rows_NK.shape[1]
        grad_RD = grad_ND.index_select(0, tokens_R).mul_(gates_R[:, None])
        return grad_RD, products_of_rows(grad_ND, y_RD, rows_NK), None, None


def products_of_rows(grad_ND: Tensor, y_RD: Tensor, rows_NK: Tensor) -> Tensor:
    """The gradients of the gates: grad · y in fp32, [N, K]; 0 where a copy has no row."""
    if len(y_RD) == 0:
        return grad_ND.new_zeros(rows_NK.shape, dtype=wide(grad_ND))
    wide_ND = grad_ND.to(wide(grad_ND))
    products = [(wide_ND * y_RD.index_select(0, row_N)).sum(1) for row_N in rows_NK.clamp(min=0).unbind(1)]
    return torch.stack(products, 1).masked_fill_(rows_NK < 0, 0)


class Unpermute(torch.autograd.Function):
    """Σ_k y for every token, [N, D] in y's dtype, summed in fp32, where the gates have been applied before.

    The orders are kept beside what checkpointing sees, so that nothing after the experts is computed again.
    """

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, order_R: Tensor, rows_NK: Tensor) -> Tensor:
        ctx.tokens_R = order_R[: len(y_RD)] // rows_NK.shape[1]
        return sum_of_rows(y_RD, rows_NK).to(y_RD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        return grad_ND.index_select(0, ctx.tokens_R), None, None


class Reorder(torch.autograd.Function):
    """The rows of y_RD in another order, whose inverse is known. Keeps the orders as `Unpermute` does."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.inverse_R = inverse_R
        return y_RD.index_select(0, order_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        return grad_RD.index_select(0, ctx.inverse_R), None, None
