"""The loss of every head: linear and cross-entropy fused (V3 eq. 24)."""

import torch
from torch import Tensor

from dsv3_lightning.model.autocast import computes_in

IGNORE = -100  # a target that doesn't count
LOGITS_HELD = 2**27  # logits at a time: 512 MiB in fp32
LOGITS_HELD_CPU = 2**20  # 4 MiB, so that they stay in the cache


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Σ of -log softmax(x W^T)[target] over the targets that aren't IGNORE: fp32 scalar (V3 eq. 24, summed).

    As with torch's cross_entropy, another target outside 0..V-1 is an error (on CUDA a device-side assertion).
    Logits exist for some tokens at a time, in fp32, and the gradients are made while they do.
    """
    held = LOGITS_HELD_CPU if x_ND.device.type == "cpu" else LOGITS_HELD
    chunk = max(1, held // weight_VD.shape[0])
    dtype = computes_in(x_ND)
    return LinearCrossEntropy.apply(x_ND.to(dtype), weight_VD.to(dtype), targets_N, chunk)


class LinearCrossEntropy(torch.autograd.Function):
    """Forward makes the gradients too, chunk by chunk, so that backward only scales them."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x_ND) if need_x else None
        total = torch.zeros((), dtype=torch.promote_types(x_ND.dtype, torch.float32), device=x_ND.device)
        grad_weight = torch.zeros_like(weight_VD, dtype=total.dtype) if need_weight else None
        # One set of buffers for all chunks: on a CPU fresh memory costs more than what is computed into it.
        logits_CV = x_ND.new_empty(min(chunk, len(x_ND)), len(weight_VD))
        log_p_CV = torch.empty_like(logits_CV, dtype=total.dtype)
        part_VD = torch.empty_like(weight_VD) if need_weight else None
        for start in range(0, len(x_ND), chunk):
            x, targets = x_ND[start : start + chunk], targets_N[start : start + chunk]
            logits = torch.mm(x, weight_VD.T, out=logits_CV[: len(x)])
            log_p = torch.log_softmax(logits, -1, dtype=total.dtype, out=log_p_CV[: len(x)])
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
    def backward(ctx, grad: Tensor):
        grad_x, grad_weight = ctx.saved_tensors
        return (
            None if grad_x is None else grad_x * grad.to(grad_x.dtype),
            None if grad_weight is None else (grad_weight * grad).to(ctx.weight_dtype),
            None,
            None,
        )
