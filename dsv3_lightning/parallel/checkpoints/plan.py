"""What a rank writes into a sharded checkpoint.

A plan needs no collective: who writes a shard that several ranks have follows from its name and its layout.
"""

from typing import Any
from zlib import crc32

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from dsv3_lightning.parallel.checkpoints.jobs import Piece, Plan
from dsv3_lightning.parallel.tensors import slices_of

ALIGNED = 64  # bytes; pieces begin at multiples in the buffer


def layout_of(tensors: dict[str, Tensor]) -> list[tuple[Any, ...]]:
    """What a plan depends on: names, dtypes, shapes and placements."""
    spread = [(t.device_mesh, t.placements) if isinstance(t, DTensor) else None for t in tensors.values()]
    return [(name, t.dtype, t.shape, how) for (name, t), how in zip(tensors.items(), spread, strict=True)]


def plan_of(tensors: dict[str, Tensor], rank: int, holders: list[int]) -> Plan:
    """The shards that this rank writes, of its tensors. holders: the ranks that have the same plain tensors."""
    pieces, at = [], 0
    for name, tensor in tensors.items():
        if not writes(name, tensor, rank, holders):
            continue
        place = slices_of(tensor)
        offsets, sizes = tuple(part.start for part in place), tuple(part.stop - part.start for part in place)
        pieces.append(Piece(name, tensor.shape, tensor.dtype, offsets, sizes, at))
        at += -(-pieces[-1].bytes // ALIGNED) * ALIGNED
    return Plan(pieces, at)


def writes(name: str, tensor: Tensor, rank: int, holders: list[int]) -> bool:
    """Whether of the ranks that have the same shard of a tensor this one writes it. Its name spreads the work."""
    draw = crc32(name.encode())
    if not isinstance(tensor, DTensor):
        return holders[draw % len(holders)] == rank
    here = tensor.device_mesh.get_coordinate()
    if here is None:
        return False
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            draw, chosen = divmod(draw, tensor.device_mesh.size(axis))
            if here[axis] != chosen:
                return False
    return True
