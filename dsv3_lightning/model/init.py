"""Initial weights that depend on the seed and a parameter's name alone, not on the number of processes or layers."""

import functools
import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

# Writes draw() to a parameter, or to one expert of stacked weights, or to the part of it that this process holds.
Fill = Callable[[Tensor, int | None, Callable[[], Tensor]], None]


def fill(parameter: Tensor, expert: int | None, draw: Callable[[], Tensor]) -> None:
    """Writes a matrix into a parameter of which this process has the whole."""
    (parameter if expert is None else parameter[expert]).copy_(draw())


def normal(shape: torch.Size, std: float, key: str, device: torch.device) -> Tensor:
    """Normal numbers, fp32, from the random stream that belongs to the key."""
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(shape, device=device).normal_(std=std, generator=generator)


@torch.no_grad()
def init_weights(model: nn.Module, std: float, seed: int, fill_parameter: Fill = fill) -> None:
    """Matrices normal with standard deviation `std`, norms 1, buffers 0.

    Each matrix has a random stream of its own, keyed by seed, name and, in stacked weights, expert: adding a module, a
    layer or an expert leaves the initial weights of the others as they are, and a process that holds a few of them
    draws only these.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.ones_(parameter)
            continue
        for expert in range(parameter.shape[0]) if parameter.dim() == 3 else (None,):
            key = f"{seed}/{name}" if expert is None else f"{seed}/{name}/{expert}"
            draw = functools.partial(normal, parameter.shape[-2:], std, key, parameter.device)
            fill_parameter(parameter, expert, draw)
    for buffer in model.buffers():
        nn.init.zeros_(buffer)
