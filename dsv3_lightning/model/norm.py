"""RMSNorm (arXiv 1910.07467), in fp32 inside whatever the precision around it."""

import torch
from torch import Tensor, nn

from dsv3_lightning.model.autocast import compute_dtype
from dsv3_lightning.model.fused_norm import rms_norm


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dim. Under autocast the result already has the dtype of the matrix products."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, compute_dtype(x))
