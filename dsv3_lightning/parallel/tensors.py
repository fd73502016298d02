"""This rank's part of a sharded tensor: where it lies in the whole, and norms over all parts."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor on this rank, a view; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def region(tensor: DTensor) -> tuple[slice, ...]:
    """Where this rank's part lies in the whole."""
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor, on the CPU; every rank must ask."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def like(weight: Tensor, own: Tensor) -> Tensor:
    """A tensor of which this rank has a part as of the weight; scalars are their own whole.

    The part stays where it is: `DTensor.from_local` would take an offloaded one to the mesh's GPU.
    """
    if not isinstance(weight, DTensor) or own.dim() == 0:
        return own
    meta = TensorMeta(weight.shape, weight.stride(), own.dtype)
    spec = DTensorSpec(weight.device_mesh, weight.placements, tensor_meta=meta)
    return DTensor(own.detach(), spec, requires_grad=False)


def part(value: Tensor, weight: Tensor) -> Tensor:
    """Of a whole tensor, or of one laid out alike, what this rank has of the weight; scalars are their own part."""
    if isinstance(value, DTensor):
        return value.to_local()
    return value[region(weight)].clone() if isinstance(weight, DTensor) and value.dim() else value


@torch.no_grad()
def place(parameter: Tensor, expert: int | None, draw: Callable[[], Tensor]) -> None:
    """Writes this rank's part of a matrix, of `expert` in stacked weights; draws none that has no part here."""
    if not isinstance(parameter, DTensor):
        (parameter if expert is None else parameter[expert]).copy_(draw())
        return
    own, where = parameter.to_local(), region(parameter)
    if expert is not None:
        if not where[0].start <= expert < where[0].stop:
            return
        own, where = own[expert - where[0].start], where[1:]
    if own.numel():
        own.copy_(draw()[where])


@torch.no_grad()
def global_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, each element once, whatever meshes they are spread over: fp32 scalar.

    Each rank adds up its parts, divided by the number of ranks that hold the same ones; one all-reduce joins them.
    """
    gradients = list(gradients)
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    if not sharded:
        return torch.nn.utils.get_total_norm(gradients)
    norms = torch.stack(torch._foreach_norm([local(gradient) for gradient in gradients], dtype=torch.float32)).double()
    copies = torch.tensor([copies_of(gradient) for gradient in gradients], dtype=norms.dtype, device=norms.device)
    total = (norms.square() / copies).sum().to(sharded[0].device_mesh.device_type)
    dist.all_reduce(total)
    return total.sqrt().float()


def copies_of(tensor: Tensor) -> int:
    """Ranks that hold the same part: all of them, of a plain tensor."""
    if not isinstance(tensor, DTensor):
        return dist.get_world_size()
    copies = 1
    for axis, placement in enumerate(tensor.placements):
        copies *= tensor.device_mesh.size(axis) if isinstance(placement, Replicate) else 1
    return copies
