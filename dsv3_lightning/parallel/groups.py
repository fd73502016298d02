"""Device meshes and process groups for the axes of a mesh."""

import os
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dsv3_lightning.parallel.mesh import MeshShape


class Meshes(NamedTuple):
    """Device meshes over the same ranks.

    dense: for everything but experts, [dp_replicate, dp_shard], or [dp_shard] without replicas.
    experts: for the shards of one expert, [dp_replicate, expert_shard] or [expert_shard].
    ep: for the ranks that hold different experts; None where every rank computes with all of them.
    small: for norms and routers, [small_replicate, small_shard], or the same as dense.
    across, within: for the ranks of an ep group that have the same place in each node, and for those of one node; None
        where a token does not travel to each node once.
    """

    dense: DeviceMesh
    experts: DeviceMesh
    ep: DeviceMesh | None
    small: DeviceMesh
    across: DeviceMesh | None = None
    within: DeviceMesh | None = None


def init_after_restart(backend: str, timeout: timedelta, device: torch.device) -> None:
    """Initializes the process group after a restart by torchrun; at the first start Lightning does it.

    device: of this rank. As Lightning does, a GPU is bound to the group: NCCL then connects at once, and splits
    communicators for the groups of a mesh instead of creating each one again.

    torchrun's store survives a restart (seen in torch 2.13). Under the old names it still holds the addresses of the
    processes that died, and the new ones would wait for them.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(f"attempt {attempt}", store)
    bound = None if device.type == "cpu" else device
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=bound)


def build_meshes(shape: MeshShape, device_type: str, timeout: timedelta | None = None) -> Meshes:
    """The meshes over the default process group, which must have `shape.ranks` ranks. Ranks of an ep group are
    neighbors.

    timeout: of the collectives of every group. Without it torch uses its default for the groups of a mesh, not the
        timeout of the default group.
    """
    meshes = lay_out(shape, device_type)
    if timeout is not None:
        set_timeout(meshes, timeout)
    return meshes


def set_timeout(meshes: Meshes, timeout: timedelta) -> None:
    """Sets how long later collectives of the meshes' groups wait for a rank."""
    for group in {group for mesh in meshes if mesh is not None for group in mesh.get_all_groups()}:
        group.set_timeout(timeout)


def lay_out(shape: MeshShape, device_type: str) -> Meshes:
    assert dist.get_world_size() == shape.ranks
    replicas = ("dp_replicate",) if shape.dp_replicate > 1 else ()
    mesh = init_device_mesh(
        device_type, (shape.dp_replicate, shape.dp_shard), mesh_dim_names=("dp_replicate", "dp_shard")
    )
    dense = small = mesh[(*replicas, "dp_shard")]
    if shape.small_shard is not None:
        sizes = (shape.ranks // shape.small_shard, shape.small_shard)
        small = init_device_mesh(device_type, sizes, mesh_dim_names=("small_replicate", "small_shard"))
    if shape.ep == 1:
        return Meshes(dense, dense, None, small)
    axes = ("dp_replicate", "expert_shard", "ep")
    mesh = init_device_mesh(device_type, (shape.dp_replicate, shape.expert_shard, shape.ep), mesh_dim_names=axes)
    meshes = Meshes(dense, mesh[(*replicas, "expert_shard")], mesh["ep"], small)
    if shape.nodes == 1:
        return meshes
    of_groups = (shape.ranks // shape.ep, shape.nodes, shape.ep // shape.nodes)
    mesh = init_device_mesh(device_type, of_groups, mesh_dim_names=("ep_groups", "ep_across", "ep_within"))
    return meshes._replace(across=mesh["ep_across"], within=mesh["ep_within"])
