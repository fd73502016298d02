"""FP8 products by torch's scaled products of tiles and blocks: CUDA's compute capability 9.0, cuBLAS 12.9 or newer.

The layouts are those that `_scaled_mm_v2` checks (aten/src/ATen/native/cuda/ScaledBlas.cpp). Not run on a GPU yet.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_lightning.model.devices import Device
from dsv3_lightning.model.fp8 import BLOCK, SIDE, Rounded


def refusal(device: Device, cuda: str | None, has_scaled_mm: bool) -> str | None:
    """Why FP8 products can't run here; None if they can. cuda: the version that torch was built with, as 12.9."""
    if device.capability != (9, 0):
        found = f"capability {'.'.join(map(str, device.capability))}" if device.capability[0] else f"a {device.type}"
        return f"torch has FP8 products with tiles for CUDA's compute capability 9.0 (Hopper) only, this is {found}"
    if cuda is None or tuple(map(int, cuda.split(".")[:2])) < (12, 9):
        return f"FP8 products with tiles need CUDA 12.9 or newer, torch was built with {cuda}"
    return None if has_scaled_mm else "this torch has no torch.nn.functional.scaled_mm"


def scaled_product(a: Rounded, b: Rounded, offsets_E: Tensor | None) -> Tensor:
    """a b in bf16. a has 1 x 128 tiles, b 128 x 1 tiles or blocks. Zeros fill up to multiples of 128."""
    assert offsets_E is None, "experts are not multiplied here"
    M, N = a.numbers.shape[0], b.numbers.shape[1]
    a, b = filled(a), filled(b)
    kinds = F.ScalingType
    if b.tile == BLOCK:
        kind, scales_b = kinds.BlockWise128x128, column_major(F.pad(b.scales, (0, 0, 0, -len(b.scales) % 4)))
    else:
        kind, scales_b = kinds.BlockWise1x128, b.scales.contiguous().t()
    out: Tensor = F.scaled_mm(
        a.numbers.contiguous(), column_major(b.numbers), column_major(a.scales), kinds.BlockWise1x128, scales_b, kind,
        output_dtype=torch.bfloat16,
    )  # fmt: skip
    return out[:M, :N]


def column_major(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


def filled(x: Rounded) -> Rounded:
    """The same numbers, with zeros up to multiples of 128 rows and columns."""
    numbers = F.pad(x.numbers, (0, -x.numbers.shape[1] % SIDE, 0, -x.numbers.shape[0] % SIDE))
    rows, columns = (size // side for size, side in zip(numbers.shape, x.tile))
    scales = F.pad(x.scales, (0, columns - x.scales.shape[1], 0, rows - x.scales.shape[0]))
    return Rounded(numbers, scales, x.tile)
