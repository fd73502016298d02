"""Linear layer and cross-entropy as one autograd function, which never holds all logits."""

from typing import Any

import torch
from torch import Tensor

IGNORE = -100  # a target that does not count


class LinearCrossEntropy(torch.autograd.Function):
    """Σ of -log softmax(x W^T)[target], in chunks of tokens.

    The forward pass computes the gradients too, so that the backward pass only scales them.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x_ND) if need_x else None
        total = torch.zeros((), dtype=torch.promote_types(x_ND.dtype, torch.float32), device=x_ND.device)
        grad_weight = torch.zeros_like(weight_VD, dtype=total.dtype) if need_weight else None
        # One set of buffers for all chunks: on a CPU fresh memory costs more than what is computed into it.
        logits_NV = x_ND.new_empty(min(chunk, len(x_ND)), len(weight_VD))
        log_p_NV = torch.empty_like(logits_NV, dtype=total.dtype)
        part_VD = torch.empty_like(weight_VD) if need_weight else None
        for start in range(0, len(x_ND), chunk):
            x, targets = x_ND[start : start + chunk], targets_N[start : start + chunk]
            logits = torch.mm(x, weight_VD.T, out=logits_NV[: len(x)])
            log_p = torch.log_softmax(logits, -1, dtype=total.dtype, out=log_p_NV[: len(x)])
            valid = targets != IGNORE
            index = targets.masked_fill(~valid, 0)[:, None]
            total -= (log_p.gather(1, index).squeeze(1) * valid).sum()
            if need_x or need_weight:
                # d loss / d logits = softmax - one-hot
                grad = log_p.exp_()
                grad.scatter_add_(1, index, grad.new_full((len(x), 1), -1.0))
                grad = logits.copy_(grad.mul_(valid[:, None]))
                if grad_x is not None:
                    torch.mm(grad, weight_VD, out=grad_x[start : start + chunk])
                if grad_weight is not None:
                    grad_weight += torch.mm(grad.T, x, out=part_VD)
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        return (
            None if grad_x is None else grad_x * grad.to(grad_x.dtype),
            None if grad_weight is None else (grad_weight * grad).to(ctx.weight_dtype),
            None,
            None,
        )
