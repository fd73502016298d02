"""Muon as Moonlight has it (arXiv 2502.16982): momentum, orthogonalized by Newton-Schulz steps, for matrices; AdamW
for all other parameters.

torch.optim.Muon has the same equations for weights [rows, columns] on one device. Here a matrix may be sharded, and
experts are stacked, gate and up side by side; each of their matrices is orthogonalized as a whole and apart.
"""

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv3_lightning.parallel.whole_matrices import Layout, layout_of, on_owners, rounds
from dsv3_lightning.training.adamw import MasterAdamW

MOMENTUM = 0.95
STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of torch.optim.Muon and https://kellerjordan.github.io/posts/muon/
EPS = 1e-7
UPDATE_RMS = 0.2  # of an update per rate, about AdamW's, so that its rate and weight decay fit (arXiv 2502.16982 §2.2)
MOST = 2**26  # numbers of a rank's whole matrices at a time, unless one alone has more


def newton_schulz_dtype(precision: str) -> torch.dtype:
    """The dtype of Newton-Schulz steps: that of the run's matrix products. precision: Lightning's name of the run's."""
    return torch.bfloat16 if precision.startswith("bf16") else torch.float32


def orthogonalized(matrices_NRC: Tensor) -> Tensor:
    """U Vᵀ of each matrix U S Vᵀ, approximately, in the dtype given: singular values become 0.68 to 1.21, but for
    those below 1/400 of the matrix's norm, which stay smaller.

    Five steps of X <- a X + (b X Xᵀ + c (X Xᵀ)²) X on the side with fewer rows.
    """
    a, b, c = COEFFICIENTS
    tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    x = matrices_NRC.mT if tall else matrices_NRC
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def update_scale(rows: int, columns: int) -> float:
    """The factor that gives an orthogonalized matrix of full rank a root mean square of UPDATE_RMS."""
    return UPDATE_RMS * math.sqrt(max(rows, columns))


class Item(NamedTuple):
    """Matrices that are worked on together: of the weight with this number those of the experts from start to stop,
    or its only one. joined: whether each is two matrices side by side."""

    weight: int
    start: int
    stop: int
    layout: Layout
    joined: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of whole matrices [count, rows, columns]."""
        return self.stop - self.start, *self.layout.shape

    @property
    def scale(self) -> float:
        rows, columns = self.layout.shape
        return update_scale(rows, columns // 2 if self.joined else columns)

    def of(self, tensor: Tensor) -> Tensor:
        """The item's part of the weight's tensor on this rank, as a view [count, rows, columns]."""
        stack = tensor if tensor.dim() == 3 else tensor[None]
        return stack[self.start : self.stop]


class Muon(MasterAdamW):
    """Muon for the first group's weights, AdamW for the others'. Weights are [rows, columns] or [experts, rows,
    columns], plain or DTensors; results don't depend on their sharding but for rounding.

    joined: weights whose matrices are two side by side. dtype: of the Newton-Schulz steps and of what travels for them.
    The state of a matrix is its momentum, which is sharded as the weight is and stored in the dtype `moments`, and a
    number of steps, which AdamW's code wants.
    """

    def __init__(
        self, groups: list[dict[str, Any]], joined: Collection[Tensor], dtype: torch.dtype,
        moments: torch.dtype = torch.float32, **settings: Any,
    ) -> None:  # fmt: skip
        super().__init__(groups, moments, **settings)
        self.dtype = dtype
        weights = groups[0]["params"]
        self.matrices = self.masters[: len(weights)]
        by_group: dict[Any, list[Item]] = {}
        for number, (weight, master) in enumerate(zip(weights, self.matrices, strict=True)):
            layout = layout_of(weight)
            experts = len(master) if master.dim() == 3 else 1
            together = 1 if layout.group else max(1, MOST // (layout.shape[0] * layout.shape[1]))
            items = by_group.setdefault(layout.group, [])
            for start in range(0, experts, together):
                stop = min(start + together, experts)
                items.append(Item(number, start, stop, layout, weight in joined))
        self.items = [*by_group.items()]

    def update(self) -> None:
        with_gradients = [master for master in self.matrices if master.grad is not None]
        self.add_to_momentum(with_gradients)
        for group, of_group in self.items:
            items = [item for item in of_group if self.matrices[item.weight].grad is not None]
            ranks = group.size() if group else 1
            for numbers in rounds([item.shape for item in items], ranks, MOST):
                self.step_on([items[number] for number in numbers])
        for master in self.matrices:
            master.grad = None  # AdamW leaves weights without gradients alone
        super().update()

    def add_to_momentum(self, masters: list[Tensor]) -> None:
        for master in masters:
            state = self.state[master]
            if not state:
                state["step"] = torch.zeros((), device=master.device)
                state["momentum_buffer"] = torch.zeros_like(master, dtype=self.moments)
            state["step"] += 1
            momentum, gradient = state["momentum_buffer"], master.grad
            assert gradient is not None
            momentum.copy_(momentum.float().lerp_(gradient, 1 - MOMENTUM))

    def step_on(self, items: list[Item]) -> None:
        """Updates this rank's parts of matrices that are all of one group. Every rank of the group must call it."""
        parts = [self.nesterov(item) for item in items]
        if items[0].layout.group is None:
            results = directions(items, parts)
        else:
            layouts = [item.layout for item in items]
            results = on_owners(parts, layouts, lambda mine, whole: directions([items[k] for k in mine], whole))
        settings = self.param_groups[0]
        rate, decay = settings["lr"], settings["weight_decay"]
        for item, result in zip(items, results, strict=True):
            master = item.of(self.matrices[item.weight])
            master.mul_(1 - rate * decay).add_(result.to(master.device), alpha=-rate * item.scale)

    def nesterov(self, item: Item) -> Tensor:
        """What is orthogonalized: the gradient and the momentum, in the proportion of the next step's momentum."""
        master = self.matrices[item.weight]
        assert master.grad is not None
        momentum = item.of(self.state[master]["momentum_buffer"]).float()
        return item.of(master.grad).lerp(momentum, MOMENTUM).to(item.layout.device, self.dtype)


def directions(items: list[Item], matrices: list[Tensor]) -> list[Tensor]:
    """The orthogonalized matrices of each item [count, rows, columns], halves apart; equal shapes are one batch."""
    halves = [matrix.chunk(2, 2) if item.joined else (matrix,) for item, matrix in zip(items, matrices, strict=True)]
    pieces = [piece for of_item in halves for piece in of_item]
    by_shape: dict[torch.Size, list[int]] = {}
    for number, piece in enumerate(pieces):
        by_shape.setdefault(piece.shape[1:], []).append(number)
    for numbers in by_shape.values():
        counts = [len(pieces[number]) for number in numbers]
        batch = orthogonalized(torch.cat([pieces[number] for number in numbers]))
        for number, piece in zip(numbers, batch.split(counts), strict=True):
            pieces[number] = piece
    found = iter(pieces)
    return [torch.cat([next(found) for _ in of_item], 2) for of_item in halves]
