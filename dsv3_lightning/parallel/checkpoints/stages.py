"""A pipeline's part of a checkpoint, which is that of the whole model: its names, and its numbers in the optimizer.

A rank has the tensors of its own stages. Names are the whole model's. The optimizer numbers its parameters, group after
group; a checkpoint has the numbers of an optimizer that has all of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


class Numbers(NamedTuple):
    """own: the number in the whole model of each of this rank's parameters. groups: the numbers of each group."""

    own: list[int]
    groups: list[list[int]]


def own_numbers(groups: Sequence[int]) -> Numbers:
    """Those of a rank that has the whole model. groups: the number of parameters in each group.

    >>> own_numbers([2, 1])
    Numbers(own=[0, 1, 2], groups=[[0, 1], [2]])
    """
    starts = [sum(groups[:i]) for i in range(len(groups) + 1)]
    return Numbers(list(range(starts[-1])), [list(range(a, b)) for a, b in zip(starts, starts[1:])])


def whole_numbers(groups: list[list[str]], order: Mapping[str, int], stages: dist.ProcessGroup) -> Numbers:
    """Those of a rank that has some stages. groups: the names of this rank's parameters in each group.

    order: the place of each name in the whole model. Every rank must call it.
    """
    found: list[Any] = [None] * stages.size()
    dist.all_gather_object(found, groups, group=stages)
    return numbered(groups, order, found)


def numbered(groups: list[list[str]], order: Mapping[str, int], of_all: list[list[list[str]]]) -> Numbers:
    """See `whole_numbers`. of_all: the groups of every rank.

    >>> numbered([["b"], ["c"]], {"a": 0, "b": 1, "c": 2, "d": 3}, [[["a"], ["d"]], [["b"], ["c"]]])
    Numbers(own=[1, 2], groups=[[0, 1], [2, 3]])
    """
    names = [sorted((name for of_rank in of_all for name in of_rank[i]), key=order.__getitem__)
             for i in range(len(groups))]  # fmt: skip
    numbers = own_numbers([len(group) for group in names])
    number = dict(zip([name for group in names for name in group], numbers.own, strict=True))
    return Numbers([number[name] for group in groups for name in group], numbers.groups)


def from_all_stages(values: dict[Any, Any], stages: dist.ProcessGroup) -> dict[Any, Any]:
    """The entries of all ranks of the group, which have different keys: small ones, on the CPU, as they are pickled."""
    found: list[Any] = [None] * stages.size()
    dist.all_gather_object(found, values, group=stages)
    return {key: value for entries in found for key, value in entries.items()}


def gather_stages(tensors: dict[Any, Tensor], stages: dist.ProcessGroup, sends: bool) -> dict[Any, Tensor]:
    """All ranks' tensors, full and on the CPU, on the first rank of the group; elsewhere empty ones.

    One tensor exists in full at a time. sends: whether this rank is the one of its stage that sends; all must call it.
    """
    own = [(key, tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()]
    found: list[Any] = [None] * stages.size()
    dist.all_gather_object(found, own, group=stages)
    mine, gathered = stages.rank(), {}
    for rank, entries in enumerate(found):
        for key, shape, dtype in entries:
            full = torch.empty(0)
            if rank == mine:
                tensor = tensors[key].detach()
                full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                if sends and rank > 0:
                    dist.send(full.contiguous(), group=stages, group_dst=0)
            elif sends and mine == 0:
                full = torch.empty(shape, dtype=dtype, device=next(iter(tensors.values())).device)
                dist.recv(full, group=stages, group_src=rank)
            gathered[key] = full.cpu() if sends and mine == 0 else full.new_empty(0)
    return gathered
