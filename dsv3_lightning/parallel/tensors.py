"""A rank's shards of tensors: taking, filling and gathering them, and norms over all of them."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, as a view; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_slices(tensor: DTensor) -> tuple[slice, ...]:
    """The slice of each dim of the full tensor that this rank's shard is."""
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def slices_of(tensor: Tensor) -> tuple[slice, ...]:
    """The slice of each dim of the full tensor that this rank has: of a plain tensor all of it."""
    return shard_slices(tensor) if isinstance(tensor, DTensor) else tuple(slice(0, size) for size in tensor.shape)


def gather_full(tensor: Tensor) -> Tensor:
    """The full tensor, on the CPU. A collective for a DTensor: every rank must call it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def as_dtensor_like(weight: Tensor, shard: Tensor) -> Tensor:
    """The DTensor whose local shard, laid out as the weight's, is `shard`; a scalar stays what it is.

    The shard stays on its device: `DTensor.from_local` would take an offloaded one to the mesh's GPU.
    """
    if not isinstance(weight, DTensor) or shard.dim() == 0:
        return shard
    meta = TensorMeta(weight.shape, weight.stride(), shard.dtype)
    spec = DTensorSpec(weight.device_mesh, weight.placements, tensor_meta=meta)
    return DTensor(shard.detach(), spec, requires_grad=False)


def local_shard(value: Tensor, weight: Tensor) -> Tensor:
    """This rank's shard, laid out as the weight's, of a full tensor or of a DTensor; a scalar stays what it is."""
    if isinstance(value, DTensor):
        return value.to_local()
    return value[shard_slices(weight)].clone() if isinstance(weight, DTensor) and value.dim() else value


@torch.no_grad()
def fill_shard(parameter: Tensor, expert: int | None, draw: Callable[[], Tensor]) -> None:
    """Writes this rank's shard of the matrix that `draw` makes, which is that of one expert in stacked weights.

    Calls `draw` only where this rank has a part of that matrix.
    """
    if not isinstance(parameter, DTensor):
        (parameter if expert is None else parameter[expert]).copy_(draw())
        return
    shard, slices = parameter.to_local(), shard_slices(parameter)
    if expert is not None:
        if not slices[0].start <= expert < slices[0].stop:
            return
        shard, slices = shard[expert - slices[0].start], slices[1:]
    if shard.numel():
        shard.copy_(draw()[slices])


@torch.no_grad()
def global_norm(gradients: Iterable[Tensor], spread_on: torch.device | None = None) -> Tensor:
    """The 2-norm of all gradients together, whatever meshes they are sharded over: fp32 scalar.

    Each rank sums the squares of its shards, divided by the number of ranks that hold the same shard; one all-reduce
    adds these sums up.
    spread_on: this rank's device, where other ranks hold other parameters. A rank without gradients then takes part.
    """
    gradients = list(gradients)
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    device = spread_on if spread_on is not None or not sharded else torch.device(sharded[0].device_mesh.device_type)
    if device is None:
        return torch.nn.utils.get_total_norm(gradients)
    if not gradients:
        total = torch.zeros((), dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.sqrt().float()
    norms = torch.stack(torch._foreach_norm([local(gradient) for gradient in gradients], dtype=torch.float32)).double()
    copies = torch.tensor([copies_of(gradient) for gradient in gradients], dtype=norms.dtype, device=norms.device)
    total = (norms.square() / copies).sum().to(device)
    dist.all_reduce(total)
    return total.sqrt().float()


def copies_of(tensor: Tensor) -> int:
    """The number of ranks that hold the same shard: all of them for a plain tensor."""
    if not isinstance(tensor, DTensor):
        return dist.get_world_size()
    copies = 1
    for axis, placement in enumerate(tensor.placements):
        copies *= tensor.device_mesh.size(axis) if isinstance(placement, Replicate) else 1
    return copies
