"""What is known about devices: which GPUs lack a fast kernel, or have one that is wrong."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class Device(NamedTuple):
    """What a choice of kernels depends on. capability: CUDA's, (0, 0) elsewhere. cudnn: its version, 0 for none."""

    type: str
    capability: tuple[int, int] = (0, 0)
    cudnn: int = 0


@cache
def device_of(device: torch.device) -> Device:
    """A device of this process. AMD's GPUs have no capability here, since what is known is about CUDA's."""
    if device.type != "cuda" or torch.version.hip is not None:
        return Device(device.type)
    return Device("cuda", torch.cuda.get_device_capability(device), torch.backends.cudnn.version() or 0)


def grouped_products_loop(device: Device, dtype: torch.dtype) -> bool:
    """Whether torch computes a grouped product with a loop over experts, which waits for the GPU at each call.

    The one kernel is for bf16 on compute capability 9.0 and 10.x (`_grouped_mm_cuda`, torch 2.11 to 2.14).
    """
    fast = device.capability == (9, 0) or device.capability[0] == 10
    return device.capability[0] > 0 and not (fast and dtype == torch.bfloat16)


def empty_experts_get_gradients(device: Device) -> bool:
    """Whether the weights of experts without tokens get gradients that are not zero: pytorch#172439, open in 2.14."""
    return device.capability[0] == 10


def zero_gradients_of_empty(grad: Tensor, offsets_E: Tensor) -> Tensor:
    """The gradient of the experts' weight [E, in, out]; where the device gets them wrong, those of experts without rows
    are set to 0.

    The rows of expert e end before row offsets_E[e].
    """
    if not empty_experts_get_gradients(device_of(grad.device)):
        return grad
    counts_E = offsets_E.diff(prepend=offsets_E.new_zeros(1))
    return torch.where(counts_E[:, None, None] > 0, grad, 0)  # not by a product: what comes may be NaN
