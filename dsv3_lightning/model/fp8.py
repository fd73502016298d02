"""Matrix products of FP8 numbers with a scale for each tile or block (V3 §3.3), and where the model has them.

All numbers are E4M3. Along the dimension that a product sums over, activations and gradients of outputs have a scale
for every 128 numbers of a row (1 x 128 tiles); weights have one for each block of 128 x 128. The gradient of a weight
sums over tokens, so its operands have 128 x 1 tiles: the input, which is kept in FP8, is regrouped, and the gradient of
the output is rounded a second time. Tiles at an edge may be smaller; tiles of tokens end where an expert's rows end.

`emulated_product` multiplies, in fp32, what FP8 numbers and scales stand for. That is the product of tensor cores whose
sums go on in fp32 after every 128 numbers, where the scales are applied (V3 §3.3.2), up to the rounding of fp32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_lightning.model.block import Block
from dsv3_lightning.model.devices import zero_gradients_of_empty
from dsv3_lightning.model.experts import Experts
from dsv3_lightning.model.weight_grad import Linear, Operands, local_part, now_or_later

E4M3, LARGEST = torch.float8_e4m3fn, 448.0
SIDE = 128
TILE, COLUMN, BLOCK = (1, SIDE), (SIDE, 1), (SIDE, SIDE)


class Rounded(NamedTuple):
    """numbers: E4M3 [..., rows, columns]. scales: fp32, one for each tile: a number stands for number · scale.

    tile: rows and columns of a tile. tile_of_row: int64, where not all tiles are full: whose scale a row has, or a
    column where tiles lie along rows.
    """

    numbers: Tensor
    scales: Tensor
    tile: tuple[int, int]
    tile_of_row: Tensor | None = None

    def wide(self) -> Tensor:
        """What the numbers stand for, in fp32."""
        if self.tile_of_row is not None:
            along = self.tile.index(SIDE)
            return self.numbers.float() * self.scales.index_select(along, self.tile_of_row)
        return self.numbers.float() * spread(self.scales, self.tile, self.numbers.shape)


Product = Callable[[Rounded, Rounded, Tensor | None], Tensor]


def round_to(tile: tuple[int, int], x: Tensor, power_of_two: bool = False) -> Rounded:
    """x [..., rows, columns] in FP8, with a scale for each tile, by which its largest number becomes 448.

    A tile with a number that is not finite has no finite number afterwards. power_of_two: scales are rounded up to
    powers of two, so that regrouping rounds only what becomes too small.
    """
    rows, columns = x.shape[-2:]
    padded = F.pad(x.float().abs(), (0, -columns % tile[1], 0, -rows % tile[0]))
    largest = padded.unflatten(-1, (-1, tile[1])).unflatten(-3, (-1, tile[0])).amax((-3, -1))
    scales = scales_for(largest, power_of_two)
    return Rounded((x.float() / spread(scales, tile, x.shape)).to(E4M3), scales, tile)


def round_tokens(x: Tensor, offsets_E: Tensor | None, power_of_two: bool = False) -> Rounded:
    """x [rows, columns] in FP8 with 128 x 1 tiles, none of which has rows of two experts."""
    if offsets_E is None:
        return round_to(COLUMN, x, power_of_two)
    tile_of_row = tiles_of_rows(offsets_E, len(x))
    largest = x.new_zeros(len(x) // SIDE + len(offsets_E) + 1, x.shape[1], dtype=torch.float32)
    largest.scatter_reduce_(0, tile_of_row[:, None].expand_as(x), x.float().abs(), "amax")
    scales = scales_for(largest, power_of_two)
    numbers = (x.float() / scales.index_select(0, tile_of_row)).to(E4M3)
    return Rounded(numbers, scales, COLUMN, tile_of_row)


def tiles_of_rows(offsets_E: Tensor, rows: int) -> Tensor:
    """The tile of each row, int64 [rows]. The rows of expert e end before offsets_E[e]; more may follow the last.

    >>> tiles_of_rows(torch.tensor([2, 2, 131]), 133).unique_consecutive(return_counts=True)
    (tensor([0, 1, 2, 3]), tensor([  2, 128,   1,   2]))
    """
    row_R = torch.arange(rows, device=offsets_E.device)
    ends_E = F.pad(offsets_E.long(), (1, 0))
    first_E = F.pad(((ends_E.diff() + SIDE - 1) // SIDE).cumsum(0), (1, 0))
    expert_R = torch.searchsorted(ends_E[1:], row_R, right=True)
    return first_E[expert_R] + (row_R - ends_E[expert_R]) // SIDE


def scales_for(largest: Tensor, power_of_two: bool) -> Tensor:
    """largest / 448, at least the smallest normal number, so that zeros stay zeros."""
    scales = (largest / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    if not power_of_two:
        return scales
    above = ((scales.view(torch.int32) + 0x7FFFFF) & ~0x7FFFFF).view(torch.float32)  # the mantissa's 23 bits become 0
    return torch.where(scales.isfinite(), above, scales)


def spread(scales: Tensor, tile: tuple[int, int], shape: torch.Size) -> Tensor:
    """The scale of every number of a tensor of this shape."""
    rows, columns = shape[-2:]
    return scales.repeat_interleave(tile[0], -2)[..., :rows, :].repeat_interleave(tile[1], -1)[..., :columns]


def transposed(x: Rounded) -> Rounded:
    return Rounded(x.numbers.mT, x.scales.mT, x.tile[::-1], x.tile_of_row)


def emulated_product(a: Rounded, b: Rounded, offsets_E: Tensor | None) -> Tensor:
    """a b in fp32: a matrix, or that of each expert's rows of a, or of the columns of a and the rows of b."""
    if offsets_E is None:
        return a.wide() @ b.wide()
    return F.grouped_mm(a.wide(), b.wide(), offs=offsets_E)


class Form(NamedTuple):
    """How a product of the model is computed in FP8. multiply: of two rounded matrices.

    input, gradient: whether the scales of its input and of its output's gradient are powers of two.
    """

    multiply: Product
    input: bool = False
    gradient: bool = False


def linear(form: Form, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight_grad.linear` in FP8; the result is in `dtype`."""
    operands = Operands(weight, dtype)
    rows = x.flatten(0, -2)
    y = RoundedProduct.apply(KeepRounded.apply(rows, weight, operands, form), weight, operands, form)
    return y.unflatten(0, x.shape[:-1])


def grouped_linear(form: Form, x: Tensor, weight: Tensor, offsets_E: Tensor) -> Tensor:
    """`weight_grad.grouped_linear` in FP8; the result is in x's dtype."""
    operands = Operands(weight, x.dtype)
    kept = KeepRounded.apply(x, weight, operands, form, offsets_E.int())
    return RoundedProduct.apply(kept, weight, operands, form)


class KeepRounded(torch.autograd.Function):
    """x in the product's dtype. Saves both operands in FP8, before the product is computed (see `weight_grad.Keep`)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, operands: Operands, form: Form, *offsets: Tensor) -> Tensor:
        x = x.to(operands.dtype)
        tiles, blocks = round_to(TILE, x, form.input), round_to(BLOCK, local_part(weight))
        saved = (tiles.numbers, tiles.scales, blocks.numbers, blocks.scales, *offsets)
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        operands.node, operands.cast, operands.needs_x = ctx, saved, ctx.needs_input_grad[0]
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return grad, *[None] * (len(ctx.needs_input_grad) - 1)


class Operand(NamedTuple):
    """What `KeepRounded` has saved. weight: [in, out], or [E, in, out] with offsets."""

    x: Rounded
    weight: Rounded
    offsets_E: Tensor | None

    @staticmethod
    def of(saved: tuple[Tensor, ...]) -> "Operand":
        x, weight = Rounded(saved[0], saved[1], TILE), Rounded(saved[2], saved[3], BLOCK)
        return Operand(x, weight, saved[4]) if len(saved) > 4 else Operand(x, transposed(weight), None)


class RoundedProduct(torch.autograd.Function):
    """x W with the gradients grad W^T and x^T grad of FP8 numbers; of a linear layer W is the transposed weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, operands: Operands, form: Form) -> Tensor:
        ctx.operands, ctx.form = operands, form
        return form.multiply(*Operand.of(operands.take())).to(operands.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        form, dtype = ctx.form, ctx.operands.dtype
        x, weight, offsets_E = Operand.of(ctx.operands.node.saved_tensors)
        grad_x = None
        if ctx.operands.needs_x:
            tiles = round_to(TILE, grad, form.gradient)
            grad_x = form.multiply(tiles, transposed(weight), offsets_E).to(dtype)
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None
        columns = round_tokens(grad, offsets_E, form.gradient)  # one byte per number in the queue

        def product() -> Tensor:
            rows = round_tokens(x.wide(), offsets_E, form.input)
            gradient = form.multiply(transposed(rows), columns, offsets_E).to(dtype)
            return gradient.t() if offsets_E is None else zero_gradients_of_empty(gradient, offsets_E)

        return grad_x, now_or_later(ctx.operands.weight, product), None, None


def use_fp8(model: nn.Module, multiply: Product, experts: bool = True) -> None:
    """Computes all linear layers of blocks in FP8, and the products of routed experts where `experts` says so.

    The embedding, heads, routers, norms, attention itself and what joins MTP's inputs stay as they are (V3 §3.3.1).
    Scales are powers of two where the report has them (§3.3.3): for the input of the layer after attention, for what
    is sent to the experts, and for the gradients that are sent to them.
    """
    for block in model.modules():
        if not isinstance(block, Block):
            continue
        for name, module in block.named_modules():
            if isinstance(module, Linear):
                module.product = partial(linear, Form(multiply, input=name == "self_attn.o_proj"))
            elif isinstance(module, Experts) and experts:
                module.gate_up_product = partial(grouped_linear, Form(multiply, input=True))
                module.down_product = partial(grouped_linear, Form(multiply, gradient=True))
