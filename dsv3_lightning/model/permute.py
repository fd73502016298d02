"""Tokens sorted by expert and back, with gradients that are gathers.

Indexing's own backward pass would scatter, which is slow on a CPU and not deterministic on CUDA.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_lightning.model.cpu import on_cpu, padded_rows


class Order(NamedTuple):
    """The order that sorts the N·K copies of N tokens by expert.

    order_R: int64, row r holds the copy with number n·K + k = order_R[r], or is empty where that is N·K (`fill_up`);
    copies for no expert come last. rows_NK: int64, the row of each copy, or -1 for one without an expert. counts_E:
    int64, the copies of each expert.
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


def fill_up(order: Order, multiple: int) -> tuple[Order, Tensor]:
    """The order with empty rows after those of each expert, up to a multiple, and where these end: int64 [E]."""
    offsets_E = order.counts_E.cumsum(0)
    if multiple == 1:
        return order, offsets_E
    rows_R, offsets_E = padded_rows(offsets_E, multiple)
    copies, added = order.rows_NK.numel(), int(offsets_E[-1]) - len(rows_R)
    rows_R = torch.cat((rows_R, torch.arange(len(rows_R), copies) + added))  # those for no expert stay the last
    order_R = order.order_R.new_full((copies + added,), copies).index_copy_(0, rows_R, order.order_R)
    there_NK = order.rows_NK >= 0
    rows_NK = rows_R[order.rows_NK].where(there_NK, -1)
    return Order(order_R, rows_NK, order.counts_E), offsets_E


def count(keys: Tensor, different: int) -> Tensor:
    """How often each of the numbers below `different` is among the keys: int64 [different]."""
    return keys.new_zeros(different).scatter_add_(0, keys.flatten(), torch.ones_like(keys).flatten())


def inverse(order_R: Tensor) -> Tensor:
    """The permutation that undoes order_R (int64)."""
    rows_R = torch.arange(len(order_R), device=order_R.device)
    return torch.empty_like(order_R).scatter_(0, order_R, rows_R)


def sum_of_rows(x_RD: Tensor, rows_NK: Tensor) -> Tensor:
    """Σ_k x over the rows rows_NK of x_RD: [N, D] in x's dtype, summed in fp32 or what is wider; a row -1 adds nothing.

    Tokens without any row get 0, whatever x_RD holds.
    """
    there_NK = rows_NK >= 0
    out_ND = torch.zeros(len(rows_NK), x_RD.shape[1], dtype=wide(x_RD), device=x_RD.device)
    if len(x_RD) == 0:
        return out_ND.to(x_RD.dtype)
    at_NK = rows_NK.clamp(min=0)
    if on_cpu(x_RD):
        out_ND = F.embedding_bag(at_NK.int(), x_RD.contiguous(), mode="sum", per_sample_weights=there_NK.to(x_RD.dtype))
    else:
        for row_N, there_N in zip(at_NK.unbind(1), there_NK.to(out_ND.dtype).unbind(1)):
            out_ND.addcmul_(x_RD.index_select(0, row_N), there_N[:, None])
    out_ND = out_ND.masked_fill(~there_NK.any(1, keepdim=True), 0)  # 0 times what is not finite is not 0
    return out_ND.to(x_RD.dtype)


def wide(x: Tensor) -> torch.dtype:
    """The dtype of sums of x: fp32, or wider."""
    return torch.promote_types(x.dtype, torch.float32)


def rows_of(x_ND: Tensor, tokens_R: Tensor, copies: int) -> Tensor:
    """The tokens with these numbers, [R, D]. More rows than copies of tokens: some are empty and have number N."""
    if len(tokens_R) > copies:
        x_ND = F.pad(x_ND, (0, 0, 0, 1))
    return x_ND.index_select(0, tokens_R)


class Permute(torch.autograd.Function):
    """The tokens x_ND in the order of their copies, [R, D]: as many rows as order_R has."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_R: Tensor, rows_NK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_NK)
        return rows_of(x_ND, order_R // rows_NK.shape[1], rows_NK.numel())

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        (rows_NK,) = ctx.saved_tensors
        return sum_of_rows(grad_RD, rows_NK), None, None


class PermuteGates(torch.autograd.Function):
    """The gates of the copies in the same order, fp32 [R], 0 in empty rows."""

    @staticmethod
    def forward(ctx: Any, gates_NK: Tensor, order_R: Tensor, rows_NK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_NK)
        empty = int(len(order_R) > rows_NK.numel())
        return F.pad(gates_NK.flatten(), (0, empty)).index_select(0, order_R)

    @staticmethod
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor | None, ...]:
        (rows_NK,) = ctx.saved_tensors
        if len(grad_R) == 0:
            return grad_R.new_zeros(rows_NK.shape), None, None
        of_copies = grad_R.index_select(0, rows_NK.clamp(min=0).flatten()).view_as(rows_NK)
        return of_copies.masked_fill(rows_NK < 0, 0), None, None


class Unpermute(torch.autograd.Function):
    """Σ_k y for every token, [N, D] in y's dtype, summed in fp32, from the rows that `Permute` has sorted.

    The orders are kept beside what checkpointing sees, so that nothing after the experts is computed again.
    """

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, order_R: Tensor, rows_NK: Tensor) -> Tensor:
        ctx.tokens_R, ctx.copies = order_R[: len(y_RD)] // rows_NK.shape[1], rows_NK.numel()
        return sum_of_rows(y_RD, rows_NK)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        return rows_of(grad_ND, ctx.tokens_R, ctx.copies), None, None


class Reorder(torch.autograd.Function):
    """The rows of y_RD in another order, whose inverse is known. Keeps the orders as `Unpermute` does."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.inverse_R = inverse_R
        return y_RD.index_select(0, order_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        return grad_RD.index_select(0, ctx.inverse_R), None, None
