"""The loss of every head: the linear output layer and cross-entropy in one (V3 eq. 24)."""

from torch import Tensor

from dsv3_lightning.model.autocast import compute_dtype
from dsv3_lightning.model.cpu import max_logits
from dsv3_lightning.model.fused_loss import IGNORE, LinearCrossEntropy

__all__ = ["IGNORE", "linear_cross_entropy"]


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, held: int | None = None) -> Tensor:
    """Σ of -log softmax(x W^T)[target] over the targets that are not IGNORE: fp32 scalar (V3 eq. 24, summed).

    As with torch's cross_entropy, another target outside 0..V-1 is an error (on CUDA a device-side assertion).
    Logits exist for some tokens at a time, `held` numbers in all (None: see `cpu.max_logits`).
    """
    chunk = max(1, max_logits(x_ND.device, held) // weight_VD.shape[0])
    dtype = compute_dtype(x_ND)
    return LinearCrossEntropy.apply(x_ND.to(dtype), weight_VD.to(dtype), targets_N, chunk)
