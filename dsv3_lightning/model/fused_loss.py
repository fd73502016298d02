"""Linear layer and cross-entropy as one autograd function, which never holds all logits."""

from typing import Any

import torch
from torch import Tensor

from dsv3_lightning.model.fused import fused

IGNORE = -100  # a target that does not count


class LinearCrossEntropy(torch.autograd.Function):
    """Σ of -log softmax(x W^T)[target], each token with its weight where there are weights, in chunks of tokens.

    product: tokens whose logits one matrix product makes; they have the dtype of x. softmax: tokens whose logits exist
    in fp32 (fp64 for fp64) at a time. The forward pass computes the gradients too, so that the backward pass only
    scales them: that of x in x's dtype, that of W in fp32. It can't see whether gradients are wanted: under `no_grad`
    pass tensors that need none.
    """

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, product: int, softmax: int,
        weights_N: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        need_x, need_weight = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x_ND) if need_x else None
        total = torch.zeros((), dtype=torch.promote_types(x_ND.dtype, torch.float32), device=x_ND.device)
        grad_weight = torch.zeros_like(weight_VD, dtype=total.dtype) if need_weight else None
        # One set of buffers for all chunks: on a CPU fresh memory costs more than what is computed into it.
        logits_NV = x_ND.new_empty(min(product, len(x_ND)), len(weight_VD))
        log_p_NV = torch.empty_like(logits_NV[:softmax], dtype=total.dtype)
        part_VD = torch.empty_like(weight_VD) if need_weight and not weight_VD.is_cuda else None
        for start in range(0, len(x_ND), product):
            x, targets = x_ND[start : start + product], targets_N[start : start + product]
            counted = targets != IGNORE
            factors = counted if weights_N is None else counted * weights_N[start : start + product]
            logits = torch.mm(x, weight_VD.T, out=logits_NV[: len(x)])
            for some, wanted, factor in zip(logits.split(softmax), targets.split(softmax), factors.split(softmax)):
                index = wanted.masked_fill(wanted == IGNORE, 0)[:, None]
                if need_x or need_weight:
                    log_p_N = overwrite_by_gradients(some, index, factor, log_p_NV[: len(some)])
                else:
                    log_p = torch.log_softmax(some, -1, dtype=total.dtype, out=log_p_NV[: len(some)])
                    log_p_N = log_p.gather(1, index).squeeze(1)
                total -= (log_p_N * factor).sum()
            if grad_x is not None:
                torch.mm(logits, weight_VD, out=grad_x[start : start + product])
            if grad_weight is not None:
                add_product(grad_weight, logits.T, x, part_VD)
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.weight_dtype, ctx.product = weight_VD.dtype, product
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        return (
            None if grad_x is None else scaled(grad_x, grad, ctx.product),
            None if grad_weight is None else (grad_weight * grad).to(ctx.weight_dtype),
            None,
            None,
            None,
            None,
        )


def overwrite_by_gradients(logits_NV: Tensor, index: Tensor, factor_N: Tensor, buffer_NV: Tensor) -> Tensor:
    """The log-probabilities of the tokens of index [N, 1], in the dtype of the buffer, which is as wide as fp32.

    The logits become the gradients of their negative sum: softmax - one-hot, times each token's factor.
    """
    if softmax_times.compiled is None:
        log_p = torch.log_softmax(logits_NV, -1, dtype=buffer_NV.dtype, out=buffer_NV)
        log_p_N = log_p.gather(1, index).squeeze(1)
        grad = log_p.exp_()
        grad.scatter_add_(1, index, grad.new_full((len(grad), 1), -1.0))
        logits_NV.copy_(grad.mul_(factor_N[:, None]))
        return log_p_N
    factor_N = factor_N.to(buffer_NV.dtype)
    grad, log_z_N = softmax_times(logits_NV, factor_N)
    log_p_N = logits_NV.gather(1, index).squeeze(1).to(buffer_NV.dtype) - log_z_N
    logits_NV.copy_(grad.scatter_(1, index, ((log_p_N.exp() - 1) * factor_N).to(grad.dtype)[:, None]))
    return log_p_N


@fused(lambda dtype: [(torch.ones(48, 64, dtype=dtype), torch.ones(48))])
def softmax_times(logits_NV: Tensor, factor_N: Tensor) -> tuple[Tensor, Tensor]:
    """softmax · factor in the dtype of the logits, and the logarithms of the sums of exponentials in that of the
    factors."""
    wide = logits_NV.to(factor_N.dtype)
    most_N1 = wide.amax(-1, keepdim=True)
    exp_NV = (wide - most_N1).exp()
    sum_N1 = exp_NV.sum(-1, keepdim=True)
    return (exp_NV * (factor_N[:, None] / sum_N1)).to(logits_NV.dtype), (most_N1 + sum_N1.log()).squeeze(1)


@torch.no_grad()
def log_probabilities(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, product: int, softmax: int
) -> tuple[Tensor, Tensor]:
    """log softmax(x W^T)[target] of each token, 0 where the target is IGNORE, and the entropy of each distribution.

    Both are fp32 (fp64 for fp64) [N], in nats. product, softmax: as those of LinearCrossEntropy, whose rounding of the
    logits this has, so that a ratio of probabilities of the same weights is exactly 1.
    """
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    log_p_N, entropy_N = (torch.zeros(len(x_ND), dtype=wide, device=x_ND.device) for _ in range(2))
    for start in range(0, len(x_ND), product):
        logits = x_ND[start : start + product] @ weight_VD.T
        for at, some in zip(range(start, start + len(logits), softmax), logits.split(softmax)):
            here = slice(at, at + len(some))
            log_p_NV = torch.log_softmax(some, -1, dtype=wide)
            counted = targets_N[here] != IGNORE
            index = targets_N[here].masked_fill(~counted, 0)[:, None]
            log_p_N[here] = log_p_NV.gather(1, index).squeeze(1) * counted
            entropy_N[here] = -(log_p_NV.exp() * log_p_NV).sum(1)
    return log_p_N, entropy_N


def add_product(total: Tensor, a: Tensor, b: Tensor, buffer: Tensor | None) -> None:
    """Adds the matrix product a b to `total`, which may be fp32 where a and b are bf16.

    buffer: of total's shape in the dtype of a and b. With None, as on CUDA, the product adds in fp32 by itself, without
    another pass over `total` (`addmm` with `out_dtype`, torch 2.10 or newer; CPUs have none).
    """
    if buffer is None:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(a, b, out=buffer)


def scaled(x: Tensor, factor: Tensor, rows: int) -> Tensor:
    """x times a scalar, in x's dtype. The factor may be wider and is not rounded; `rows` rows are wide at a time."""
    if x.dtype == factor.dtype:
        return x * factor
    out = torch.empty_like(x)
    for part, result in zip(x.split(rows), out.split(rows)):
        result.copy_(part.to(factor.dtype) * factor)
    return out
