"""RMSNorm (arXiv 1910.07467), in fp32 inside whatever the precision around it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_lightning.model.autocast import compute_dtype


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dim. Under autocast the result already has the dtype of the matrix products."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        out = F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps)
        return out.to(compute_dtype(x))
