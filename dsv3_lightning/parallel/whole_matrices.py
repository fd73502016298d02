"""Work on whole matrices that are sharded: each rank of a group puts some of them together and gives the parts back.

Two all-to-alls take as many matrices as the group has ranks, or more where they are small: every rank sends its parts
of each matrix to the one that owns it, and gets its parts of the results. A matrix is whole on its owner alone.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

Work = Callable[[list[int], list[Tensor]], list[Tensor]]  # takes numbers of matrices, and these; returns the results


class Layout(NamedTuple):
    """How the matrices [rows, columns] of a weight lie. Those of experts are as many as this rank has.

    shape: of a whole matrix. dim: the one that the group shards, or None for whole matrices. device: to work on.
    """

    shape: tuple[int, int]
    dim: int | None
    group: dist.ProcessGroup | None
    device: torch.device


def layout_of(weight: Tensor) -> Layout:
    """The layout of a weight [rows, columns] or [experts, rows, columns].

    Whole experts on different ranks are no shards of a matrix. Copies of the model have their own groups.
    """
    shape, stacked = (weight.shape[-2], weight.shape[-1]), weight.dim() - 2
    if not isinstance(weight, DTensor):
        return Layout(shape, None, None, weight.device)
    mesh = weight.device_mesh
    device = torch.device(mesh.device_type)  # offloaded shards travel and are worked on where the model computes
    for axis, placement in enumerate(weight.placements):
        if isinstance(placement, Shard) and placement.dim >= stacked and mesh.size(axis) > 1:
            return Layout(shape, placement.dim - stacked, mesh.get_group(axis), device)
    return Layout(shape, None, None, device)


def rounds(shapes: Sequence[tuple[int, int, int]], ranks: int, most: int) -> list[list[int]]:
    """The stacks of matrices [count, rows, columns] to work on at a time; number k of a round belongs to rank
    k % ranks. The largest come first, so that ranks have equal work.

    most: numbers of a rank's matrices in a round, unless one alone has more.

    >>> rounds([(1, 4, 4), (1, 2, 2), (1, 4, 4), (1, 2, 2), (1, 2, 2)], ranks=2, most=20)
    [[0, 2, 1, 3], [4]]
    """
    order = sorted(range(len(shapes)), key=lambda i: (-size(shapes[i]), shapes[i], i))
    found: list[list[int]] = []
    held = 0
    for start in range(0, len(order), ranks):
        row = order[start : start + ranks]
        largest = size(shapes[row[0]])
        if not found or held + largest > most:
            found.append([])
            held = 0
        found[-1] += row
        held += largest
    return found


def size(shape: Sequence[int]) -> int:
    count, rows, columns = shape
    return count * rows * columns


def shard_sizes(size: int, ranks: int) -> list[int]:
    """The sizes of shards, as DTensor has them: equal ones, of which the last may be shorter or empty.

    >>> shard_sizes(10, 4), shard_sizes(2, 3)
    ([3, 3, 3, 1], [1, 1, 0])
    """
    each = -(-size // ranks)
    return [max(0, min(each, size - rank * each)) for rank in range(ranks)]


def on_owners(parts: list[Tensor], layouts: Sequence[Layout], work: Work) -> list[Tensor]:
    """This rank's parts of the results of `work` on whole matrices. Every rank of the layouts' group must call it.

    parts: of each matrix this rank's [1, rows, columns], of one dtype and device. Rank k % ranks works on matrix k.
    """
    group = layouts[0].group
    assert group is not None, "the matrices must be sharded"
    ranks = group.size()
    mine = list(range(group.rank(), len(parts), ranks))
    order = [k for rank in range(ranks) for k in range(rank, len(parts), ranks)]  # by owner
    sizes = {k: shard_sizes(layouts[k].shape[layouts[k].dim or 0], ranks) for k in mine}
    sent = [sum(parts[k].numel() for k in range(rank, len(parts), ranks)) for rank in range(ranks)]
    shapes = [[shape_of(layouts[k], sizes[k][rank]) for k in mine] for rank in range(ranks)]
    received = [sum(size(shape) for shape in of_rank) for of_rank in shapes]
    found = exchange([parts[k] for k in order], sent, received, group, parts[0])
    pieces = found.split([size(shape) for of_rank in shapes for shape in of_rank])
    whole = [
        torch.cat([pieces[rank * len(mine) + i].view(shapes[rank][i]) for rank in range(ranks)], 1 + dim_of(layouts[k]))
        for i, k in enumerate(mine)
    ]
    results = [
        result.split(sizes[k], 1 + dim_of(layouts[k])) for k, result in zip(mine, work(mine, whole), strict=True)
    ]
    back = [of_matrix[rank] for rank in range(ranks) for of_matrix in results]
    returned = exchange(back, received, sent, group, parts[0]).split([parts[k].numel() for k in order])
    by_number = dict(zip(order, returned, strict=True))
    return [by_number[k].view(part.shape) for k, part in enumerate(parts)]


def dim_of(layout: Layout) -> int:
    assert layout.dim is not None, "the matrix must be sharded"
    return layout.dim


def shape_of(layout: Layout, length: int) -> tuple[int, int, int]:
    """The shape of a part of this length."""
    rows, columns = layout.shape
    return (1, length, columns) if layout.dim == 0 else (1, rows, length)


def exchange(
    parts: list[Tensor], sent: list[int], received: list[int], group: dist.ProcessGroup, like: Tensor
) -> Tensor:
    """Sends the parts, sorted by rank, and returns what arrives, sorted by rank: numbers in one dim."""
    out = like.new_empty(sum(received))
    packed = torch.cat([like.new_empty(0), *(part.flatten() for part in parts)])
    dist.all_to_all_single(out, packed, received, sent, group)
    return out
