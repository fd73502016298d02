"""RMSNorm as one pass over the data forward and one backward, where functions are compiled."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_lightning.model.fused import fused

SIZE = 32  # of the examples' rows


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x / rms(x) · weight over the last dim, computed in fp32 or what is wider, in `dtype`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if normalized.compiled is None:
        return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(dtype)
    return RMSNormFunction.apply(x, weight, eps, dtype)


class RMSNormFunction(torch.autograd.Function):
    """`rms_norm` by the fused functions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        ctx.weight_dtype = weight.dtype
        weight = weight.to(wide, copy=True)  # in inference mode as x is, not a parameter
        out, factor = normalized(rows_of(x), weight, weight.new_tensor(eps), dtype)
        ctx.save_for_backward(x, weight, factor)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, factor = ctx.saved_tensors
        grad_x, grad_weight = normalized_backward(rows_of(grad), rows_of(x), weight, factor)
        return grad_x.view(x.shape), grad_weight.to(ctx.weight_dtype), None, None


def rows_of(x: Tensor) -> Tensor:
    """x with all dims but the last joined, contiguous, so that one program serves all strides."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def examples(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Rows of the residual stream, which is fp32 under autocast, and of latents, which have the products' dtype."""
    weight = torch.ones(SIZE)
    rows = [torch.ones(48, SIZE, dtype=each) for each in dict.fromkeys((torch.float32, dtype))]
    return [(x, weight, weight.new_tensor(1e-6), dtype) for x in rows]


def examples_backward(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    grad, factor = torch.ones(48, SIZE, dtype=dtype), torch.ones(48, 1)
    return [(grad, x, weight, factor) for x, weight, _, _ in examples(dtype)]


@fused(examples)
def normalized(x: Tensor, weight: Tensor, eps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The rows of x / rms(x) · weight in `dtype`, and 1 / rms(x) [rows, 1]."""
    wide = x.to(weight.dtype)
    factor = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * factor * weight).to(dtype), factor


@fused(examples_backward)
def normalized_backward(grad: Tensor, x: Tensor, weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x, in its dtype, and of the weight."""
    normal, grad = x.to(weight.dtype) * factor, grad.to(weight.dtype)
    grad_normal = grad * weight
    grad_x = (grad_normal - normal * (grad_normal * normal).mean(-1, keepdim=True)) * factor
    return grad_x.to(x.dtype), (grad * normal).sum(0)
