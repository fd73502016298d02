"""Copies of a model's weights, of which each rank has its shards: taking, putting back, saving, and gathering whole."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.parallel.strategy import MeshStrategy
from dsv3_lightning.parallel.tensors import as_dtensor_like, gather_full, local, local_shard


def own_copy(weight: Tensor) -> Tensor:
    """A copy of this rank's shard of a weight: fp32 on the CPU, never a view."""
    return local(weight.detach()).to("cpu", torch.float32, copy=True)


def gather_all(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: gather_full(tensor) for name, tensor in tensors.items()}


@torch.no_grad()
def put(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Sets this rank's shards of the weights."""
    reshard(model)
    for name, weight in model.named_parameters():
        local(weight).copy_(values[name])


def reshard(model: nn.Module) -> None:
    """Frees parameters that FSDP has gathered, so that only the shards remain."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def copies(model: nn.Module) -> dict[str, Tensor]:
    """This rank's shard of each weight, fp32 on the CPU, by name."""
    reshard(model)
    return {name: own_copy(weight) for name, weight in model.named_parameters()}


def to_store(model: nn.Module, values: dict[str, Tensor], strategy: Any) -> dict[str, Tensor]:
    """Such copies as a checkpoint of the strategy has them: whole on the first rank, or shards. All ranks call it."""
    reshard(model)
    weights = dict(model.named_parameters())
    laid = {
        name: as_dtensor_like(weights[name], value.to(local(weights[name]).device)) for name, value in values.items()
    }
    save: Callable[[dict[str, Tensor]], dict[str, Tensor]] = (
        strategy.to_save if isinstance(strategy, MeshStrategy) else gather_all
    )
    return save(laid)


def from_store(model: nn.Module, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The copies that `to_store` was given, of this rank's shards now."""
    reshard(model)
    return {name: local_shard(stored[name], weight).cpu() for name, weight in model.named_parameters()}


@torch.no_grad()
def whole_model(model: Transformer, device: torch.device, earlier: Transformer | None = None) -> Transformer:
    """The model itself, or if its weights are sharded a copy with whole ones on this device. All ranks call it.

    earlier: a copy that was made before, which is filled again.
    """
    reshard(model)
    if not any(isinstance(weight, DTensor) for weight in model.parameters()):
        return model
    if earlier is None:
        with torch.device("meta"):
            earlier = Transformer(model.config)
        earlier.to_empty(device=device)
        earlier.tie_weights()
    own = dict(earlier.named_parameters()) | dict(earlier.named_buffers())
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        own[name].copy_(gather_full(value))
    return earlier.eval()
