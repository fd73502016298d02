"""Rows that travel with numbers of their own: a token and its gates in one message of one dtype.

Each fp32 number becomes three columns in the dtype of the tokens, which add up to it: significands of 3 times 8 bits in
bf16 hold the 24 of fp32. So gates and their gradients arrive exactly, and nothing in a message is a bit pattern of
another dtype.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_lightning.model.permute import sum_of_rows

PARTS = 3
ALIGNED = 16  # bytes; torch's fastest kernels want rows to begin at multiples


def columns(numbers: int, itemsize: int) -> int:
    """The number of columns, of itemsize bytes each, that a message has beside its token."""
    unit = ALIGNED // itemsize
    return -(-PARTS * numbers // unit) * unit


def as_columns(numbers_RC: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers, fp32, as columns of a message."""
    parts, rest = [], numbers_RC.float()
    for _ in range(PARTS):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1]
    missing = columns(numbers_RC.shape[1], dtype.itemsize) - PARTS * numbers_RC.shape[1]
    return F.pad(torch.cat(parts, 1), (0, missing))


def from_columns(columns_R: Tensor, numbers: int) -> Tensor:
    """What `as_columns` was given: fp32 [R, numbers]."""
    parts = columns_R[:, : PARTS * numbers].float().unflatten(1, (PARTS, numbers)).flip(1)  # the smallest first
    return parts.sum(1)


class Pack(torch.autograd.Function):
    """Messages of tokens x_ND in the order order_R, as in `permute.Permute`, with numbers_RC of their rows."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, numbers_RC: Tensor, order_R: Tensor, rows_NK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_NK)
        ctx.sizes = D, C = x_ND.shape[1], numbers_RC.shape[1]
        message = x_ND.new_empty(len(order_R), D + columns(C, x_ND.itemsize))
        torch.index_select(x_ND, 0, order_R // rows_NK.shape[1], out=message[:, :D])
        message[:, D:] = as_columns(numbers_RC, x_ND.dtype)
        return message

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rows_NK,) = ctx.saved_tensors
        D, C = ctx.sizes
        return sum_of_rows(grad[:, :D], rows_NK).to(grad.dtype), from_columns(grad[:, D:], C), None, None


class Unpack(torch.autograd.Function):
    """Tokens [R, D] and fp32 numbers [R, C] of messages, in the order order_R, whose inverse is known; None: as they
    came."""

    @staticmethod
    def forward(
        ctx: Any, message: Tensor, C: int, order_R: Tensor | None = None, inverse_R: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(inverse_R)
        D = message.shape[1] - columns(C, message.itemsize)
        x_RD, numbers_RC = message[:, :D], from_columns(message[:, D:], C)
        if order_R is None:
            return x_RD.contiguous(), numbers_RC
        return x_RD.index_select(0, order_R), numbers_RC.index_select(0, order_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor, grad_RC: Tensor) -> tuple[Tensor | None, ...]:
        (inverse_R,) = ctx.saved_tensors
        (R, D), C = grad_RD.shape, grad_RC.shape[1]
        message = grad_RD.new_empty(R, D + columns(C, grad_RD.itemsize))
        if inverse_R is None:
            message[:, :D] = grad_RD
        else:
            torch.index_select(grad_RD, 0, inverse_R, out=message[:, :D])
            grad_RC = grad_RC.index_select(0, inverse_R)
        message[:, D:] = as_columns(grad_RC, grad_RD.dtype)
        return message, None, None, None
