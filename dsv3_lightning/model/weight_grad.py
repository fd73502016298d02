"""Matrix products whose backward pass is in two parts: the gradient of the input, and the gradient of the weight.

The layer before waits for the first part; nothing but the optimizer needs the second. A pipeline schedule computes the
second part later, when its rank would otherwise wait (V3 §3.2.1; arXiv 2401.10241). All linear layers of blocks and the
products of the experts are made here. Routers and norms get their gradients at once, since they are small, and so does
the output head: `fused_loss` computes its weight's gradient in the forward pass.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_lightning.model.autocast import compute_dtype
from dsv3_lightning.model.devices import zero_gradients_of_empty


class WeightQueue:
    """Weight gradients that are computed later: those of the backward passes that run inside `collect`.

    `run` computes them, once each, and adds them to `weight.grad`, which is fp32 also where the weight is bf16. Until
    then the queue holds the inputs of the products and the gradients of their outputs.
    """

    collecting: ClassVar["WeightQueue | None"] = None  # of the process, since autograd has threads of its own for GPUs

    def __init__(self) -> None:
        self.waiting: deque[Callable[[], None]] = deque()

    @contextmanager
    def collect(self) -> Iterator["WeightQueue"]:
        before, WeightQueue.collecting = WeightQueue.collecting, self
        try:
            yield self
        finally:
            WeightQueue.collecting = before

    @torch.no_grad()
    def run(self) -> None:
        while self.waiting:
            self.waiting.popleft()()


class Linear(nn.Linear):
    """x [..., in] -> [..., out], without a bias, in the dtype that autocast chooses or x has."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.product: Callable[[Tensor, Tensor, torch.dtype], Tensor] = linear  # or that of fp8.py

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, compute_dtype(x))


def linear(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x [..., in] times weight [out, in] transposed: [..., out], in `dtype`."""
    operands = Operands(weight, dtype)
    return LinearProduct.apply(Keep.apply(x, weight, operands), weight, operands)


def grouped_linear(x: Tensor, weight: Tensor, offsets_E: Tensor) -> Tensor:
    """Row r of x [R, in] times the matrix of its expert in weight [E, in, out]: [R, out], in x's dtype.

    The rows of expert e end before row offsets_E[e] (int64). Of a DTensor the part of this process is used. Casts are
    explicit, since autocast does not cover grouped products.
    """
    operands = Operands(weight, x.dtype)
    return GroupedProduct.apply(Keep.apply(x, weight, operands, offsets_E.int()), weight, operands)


class Operands:
    """Of one product: the weight, a leaf or not, the dtype, and how its backward pass finds what `Keep` has saved."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype
        self.needs_x = False
        self.cast: tuple[Tensor, ...] = ()
        self.node: Any = None

    def take(self) -> tuple[Tensor, ...]:
        """The weight in the product's dtype, and what came with it: once, for the forward pass."""
        cast, self.cast = self.cast, ()
        return cast


class Keep(torch.autograd.Function):
    """x in the product's dtype. Saves all that the product's backward pass needs, before the product is computed.

    torch ends a recomputation at the last tensor to be saved, so that a block's last product is not computed again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, operands: Operands, *others: Tensor) -> Tensor:
        x, weight = x.to(operands.dtype), local_part(weight).to(operands.dtype)
        ctx.save_for_backward(x, weight, *others)
        ctx.set_materialize_grads(False)
        operands.node, operands.cast, operands.needs_x = ctx, (weight, *others), ctx.needs_input_grad[0]
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return grad, *[None] * (len(ctx.needs_input_grad) - 1)


class LinearProduct(torch.autograd.Function):
    """x W^T, with the gradients grad W and grad^T x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, operands: Operands) -> Tensor:
        ctx.operands = operands
        return F.linear(x, *operands.take())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.operands.node.saved_tensors
        rows, grad_rows = x.flatten(0, -2), grad.flatten(0, -2)
        grad_x = (grad_rows @ weight).view_as(x) if ctx.operands.needs_x else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        return grad_x, now_or_later(ctx.operands.weight, lambda: grad_rows.t() @ rows), None


class GroupedProduct(torch.autograd.Function):
    """x W of each expert's rows, with the gradients grad W^T and x^T grad of each expert's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, operands: Operands) -> Tensor:
        ctx.operands = operands
        weight, offsets_E = operands.take()
        return F.grouped_mm(x, weight, offs=offsets_E)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, offsets_E = ctx.operands.node.saved_tensors
        grad_x = F.grouped_mm(grad, weight.transpose(1, 2), offs=offsets_E) if ctx.operands.needs_x else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None

        def product() -> Tensor:
            return zero_gradients_of_empty(F.grouped_mm(x.t(), grad, offs=offsets_E), offsets_E)

        return grad_x, now_or_later(ctx.operands.weight, product), None


def now_or_later(weight: Tensor, product: Callable[[], Tensor]) -> Tensor | None:
    """The gradient of a weight; None if a queue collects, which then has `product`. Only leaves can wait."""
    queue = WeightQueue.collecting
    if queue is None or not weight.is_leaf:
        return like(weight, product())
    queue.waiting.append(partial(accumulate, weight, product))
    return None


def accumulate(weight: Tensor, product: Callable[[], Tensor]) -> None:
    """Adds a gradient to that of the weight.

    Sums are fp32: FSDP's gathered bf16 weights get gradients of several micro-batches before they are reduced.
    """
    gradient = product()
    if weight.grad is not None:
        local_part(weight.grad).add_(gradient)
        return
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight.grad_dtype = wide
    weight.grad = like(weight, gradient.to(wide))


def local_part(weight: Tensor) -> Tensor:
    """The part of a DTensor that this process computes with; a plain tensor itself."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def like(weight: Any, part: Tensor) -> Tensor:
    """The gradient of a DTensor from that of this process's part; of a plain tensor the gradient itself."""
    if not hasattr(weight, "to_local"):
        return part
    layout = {"shape": weight.shape, "stride": weight.stride()}
    gradient: Tensor = type(weight).from_local(part, weight.device_mesh, weight.placements, run_check=False, **layout)
    return gradient
