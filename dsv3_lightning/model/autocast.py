"""What autocast means to operations that it doesn't know."""

import torch
from torch import Tensor


def computes_in(x: Tensor) -> torch.dtype:
    """The dtype of a product with x, under autocast or not."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
