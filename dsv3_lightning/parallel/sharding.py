"""FSDP2 units of the model and their precision (torch.distributed.fsdp.fully_shard).

The units are: each block's matrices, each block's experts, the embedding, the output head, and all small parameters
together. The last are norms and routers, which stay fp32, are sharded within a node, and are gathered once per pass.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard

from dsv3_lightning.model.block import Block
from dsv3_lightning.model.dispatch import Dispatcher
from dsv3_lightning.model.moe import MoE
from dsv3_lightning.model.mtp import MTPModule
from dsv3_lightning.model.phases import overlap_halves
from dsv3_lightning.model.router import Router
from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.parallel.dispatch import AllToAll
from dsv3_lightning.parallel.groups import Meshes
from dsv3_lightning.parallel.mesh import StrategyConfig
from dsv3_lightning.parallel.node_dispatch import NodeAllToAll

MakeDispatcher = Callable[[dist.ProcessGroup, int], Dispatcher]  # takes the ep group and the number of experts


def shard_model(
    model: Transformer, meshes: Meshes, config: StrategyConfig, precision: str,
    dispatcher: MakeDispatcher = AllToAll,
) -> None:  # fmt: skip
    """Makes every parameter a DTensor, in place; the model may be on the meta device.

    Shards, their gradients and gradient reductions are fp32. precision: Lightning's name; with `bf16-mixed` and
    `bf16-true` matrices are gathered in bf16, and a micro-batch's gradients are computed in bf16.
    In a pipeline the model is one of this rank's stages, whose schedule gathers all parameters once and frees them.
    """
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    matrices = exact if precision == "32-true" else replace(exact, param_dtype=torch.bfloat16)
    embedding = matrices if precision == "bf16-true" else exact  # mixed: the residual stream starts in fp32
    reshard = config.reshard_after_forward and config.pipeline_parallel == 1
    offload = CPUOffloadPolicy() if config.cpu_offload else OffloadPolicy()

    def unit(module: nn.Module, policy: MixedPrecisionPolicy, reshard: bool, **arguments: Any) -> None:
        skipped: set[nn.Parameter] = {p for p in module.parameters() if isinstance(p, DTensor) and p.dim() != 3}
        fully_shard(module, reshard_after_forward=reshard, mp_policy=policy, offload_policy=offload,
                    ignored_params=skipped, **{"mesh": meshes.dense} | arguments)  # fmt: skip

    for moe in (module for module in model.modules() if isinstance(module, MoE)):
        spread_experts(moe, meshes, dispatcher)

    if config.overlap == "two_batches":
        overlap_halves(model)
    # The root comes first, with only the small parameters, so that later units skip these.
    tied = model.config.tie_word_embeddings
    small = small_parameters(model) | ({model.embed_tokens.weight} if tied else set())
    fully_shard(model, mesh=meshes.dense if tied else meshes.small, reshard_after_forward=False, mp_policy=exact,
                offload_policy=offload, ignored_params=set(model.parameters()) - small)  # fmt: skip
    for block in blocks(model):
        if isinstance(block.mlp, MoE):
            experts = block.mlp.experts
            unit(experts, matrices, reshard, mesh=meshes.experts,
                 shard_placement_fn=expert_placement(meshes))  # fmt: skip
            if meshes.ep is not None:  # gradients are sums over the ep ranks' tokens, but the mean is over all ranks
                as_unit(experts).set_gradient_divide_factor(float(meshes.dense.size()))
                # gloo has no pre-multiplied sum; with this set, torch 2.13 would divide twice in a group of one
                as_unit(experts).set_force_sum_reduction_for_comms(meshes.experts.size(-1) > 1)
        unit(block, matrices, reshard)
    for module in model.mtp:
        if isinstance(module, MTPModule):
            unit(module.eh_proj, matrices, reshard)
    first, last = hasattr(model, "embed_tokens"), hasattr(model, "lm_head")  # one of several stages may have neither
    if first and not tied:
        unit(model.embed_tokens, embedding, reshard)
        as_unit(model.embed_tokens).set_unshard_in_backward(False)  # its gradient doesn't need the weight
    if last and not tied:
        unit(model.lm_head, matrices, False)  # the backward pass starts with it
        register_fsdp_forward_method(model.lm_head, "loss")
    if tied and embedding is not exact:  # a tied embedding is gathered in fp32, with the norms
        model.embed_tokens.register_forward_hook(lambda _module, _inputs, out: out.bfloat16())
    if config.pipeline_parallel == 1:
        for method in ("losses", "token_scores"):
            register_fsdp_forward_method(model, method)
        prefetch(gathers(model), config.prefetch)


def sync_gradients_of_replicas(model: Transformer, wanted: bool) -> None:
    """Sets whether the next backward pass also reduces gradients over the ranks that hold the same shard. Until one
    does, each rank adds them up in fp32."""
    as_unit(model).set_requires_all_reduce(wanted)


def blocks(model: Transformer) -> list[Block]:
    return [*model.layers, *(module.block for module in model.mtp)]


def small_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Norms and routers, which are fp32 in every precision and too small to be gathered block by block."""
    routers = {module.weight for module in model.modules() if isinstance(module, Router)}
    return routers | {p for p in model.parameters() if p.dim() == 1}


def spread_experts(moe: MoE, meshes: Meshes, dispatcher: MakeDispatcher) -> None:
    """Splits a layer's experts, still on the meta device, over the ep group, and sets the dispatcher."""
    if meshes.ep is None:
        return
    for name, weight in list(moe.experts.named_parameters()):
        local_EDF = weight.new_empty(weight.shape[0] // meshes.ep.size(), *weight.shape[1:])
        spread = DTensor.from_local(
            local_EDF, meshes.ep, [Shard(0)], run_check=False, shape=weight.shape, stride=weight.stride()
        )
        setattr(moe.experts, name, nn.Parameter(spread))
    group, experts = meshes.ep.get_group(), moe.experts.num_experts
    if meshes.across is None or meshes.within is None or dispatcher is not AllToAll:
        moe.dispatcher = dispatcher(group, experts)
    else:
        moe.dispatcher = NodeAllToAll(group, experts, meshes.across.get_group(), meshes.within.get_group())


def expert_placement(meshes: Meshes) -> Callable[[nn.Parameter], Shard]:
    """Shards experts along the first dim that divides evenly: whole experts if possible, else their rows or columns.

    With an ep group the expert dim is already taken.
    """
    shards, first = meshes.experts.size(-1), 0 if meshes.ep is None else 1

    def placement(weight: Tensor) -> Shard:
        return Shard(next((dim for dim in range(first, 3) if weight.shape[dim] % shards == 0), first))

    return placement


def gathers(model: Transformer) -> list[list[FSDPModule]]:
    """The units in the order in which the forward pass gathers them, those of a block together."""
    order = [units(cast(Block, block)) for block in model.layers]
    for module in model.mtp:
        projection = [[as_unit(module.eh_proj)]] if isinstance(module, MTPModule) else []
        order += [*projection, units(cast(Block, module.block))]
    tied = model.config.tie_word_embeddings
    return order if tied else [[as_unit(model.embed_tokens)], *order, [as_unit(model.lm_head)]]


def prefetch(order: list[list[FSDPModule]], ahead: int) -> None:
    """Lets FSDP gather the next `ahead` of these while one computes, in the forward and the backward pass."""
    if not ahead:
        return
    for sequence, announce in (
        (order, FSDPModule.set_modules_to_forward_prefetch),
        (order[::-1], FSDPModule.set_modules_to_backward_prefetch),
    ):
        for i, (first, *_) in enumerate(sequence[:-1]):
            announce(first, [unit for following in sequence[i + 1 : i + 1 + ahead] for unit in following])


def units(block: Block) -> list[FSDPModule]:
    """The FSDP units of a block: the block itself and, if it has any, its experts."""
    return [as_unit(block), *([as_unit(block.mlp.experts)] if isinstance(block.mlp, MoE) else [])]


def as_unit(module: nn.Module) -> FSDPModule:
    """The module, typed as the FSDPModule that `fully_shard` has made it by changing its class."""
    return cast(FSDPModule, module)
