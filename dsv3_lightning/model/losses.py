"""The loss of every head: the linear output layer and cross-entropy in one (V3 eq. 24)."""

import torch
from torch import Tensor

from dsv3_lightning.model.autocast import compute_dtype
from dsv3_lightning.model.cpu import LossChunks, loss_chunks
from dsv3_lightning.model.fused_loss import IGNORE, LinearCrossEntropy

__all__ = ["IGNORE", "linear_cross_entropy"]


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    chunks: LossChunks | None = None,
    weights_N: Tensor | None = None,
) -> Tensor:
    """Σ of -log softmax(x W^T)[target] over the targets that are not IGNORE: fp32 scalar (V3 eq. 24, summed).

    As with torch's cross_entropy, another target outside 0..V-1 is an error (on CUDA a device-side assertion).
    Logits exist for some tokens at a time (chunks; None: see `cpu.loss_chunks`). weights_N: a factor on each, fp32.
    """
    dtype = compute_dtype(x_ND)
    x_ND, weight_VD = x_ND.to(dtype), weight_VD.to(dtype)
    if not torch.is_grad_enabled():
        x_ND, weight_VD = x_ND.detach(), weight_VD.detach()
    chosen = chunks or loss_chunks(x_ND.device.type, len(weight_VD))
    return LinearCrossEntropy.apply(x_ND, weight_VD, targets_N, *chosen, weights_N)
