"""Device meshes and process groups for the axes of a mesh."""

import atexit
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _destroy_dist_connection
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dsv3_lightning.parallel.mesh import MeshShape


class Meshes(NamedTuple):
    """Device meshes over the same ranks: all of them, or with a pipeline those of this rank's stage.

    dense: for everything but experts, [dp_replicate, dp_shard], or [dp_shard] without replicas.
    experts: for the shards of one expert, [dp_replicate, expert_shard] or [expert_shard].
    ep: for the ranks that hold different experts; None where every rank computes with all of them.
    small: for norms and routers, [small_replicate, small_shard], or the same as dense.
    across, within: for the ranks of an ep group that have the same place in each node, and for those of one node; None
        where a token does not travel to each node once.
    pp: for the ranks that hold the other stages, for the same samples. data: for the ranks of a stage, in one axis.
        Both are None without a pipeline.
    """

    dense: DeviceMesh
    experts: DeviceMesh
    ep: DeviceMesh | None
    small: DeviceMesh
    across: DeviceMesh | None = None
    within: DeviceMesh | None = None
    pp: DeviceMesh | None = None
    data: DeviceMesh | None = None


def init_in_launchers_store(attempt: str | None, backend: str, timeout: timedelta, device: torch.device) -> None:
    """Initializes the process group where ranks meet in a store of torchrun; elsewhere Lightning does it.

    attempt: the name of this start, None elsewhere. device: of this rank. As Lightning does, a GPU is bound to the
    group: NCCL then connects at once, and splits communicators for the groups of a mesh instead of creating each one
    again.

    The store survives a restart (seen in torch 2.13). Under the old names it still holds the addresses of the
    processes that died, and the new ones would wait for them.
    """
    if attempt is None or dist.is_initialized():
        return
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(f"attempt {attempt}", store)
    bound = None if device.type == "cpu" else device
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=bound)
    if "nccl" in backend:  # as Lightning does
        atexit.register(_destroy_dist_connection)


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

    def mesh_of(**sizes: int) -> DeviceMesh:
        """Axes within a stage, beside the one over the stages if there are several."""
        axes = {"pp": shape.pp, **sizes} if shape.pp > 1 else sizes
        return init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))

    replicas = ("dp_replicate",) if shape.dp_replicate > 1 else ()
    mesh = mesh_of(dp_replicate=shape.dp_replicate, dp_shard=shape.dp_shard)
    dense = small = mesh[(*replicas, "dp_shard")]
    if shape.small_shard is not None:
        replicate = shape.data_ranks // shape.small_shard
        small = mesh_of(small_replicate=replicate, small_shard=shape.small_shard)["small_replicate", "small_shard"]
    meshes = Meshes(dense, dense, None, small)
    if shape.pp > 1:
        mesh = mesh_of(data=shape.data_ranks)
        meshes = meshes._replace(pp=mesh["pp"], data=mesh["data"])
    if shape.ep == 1:
        return meshes
    mesh = mesh_of(dp_replicate=shape.dp_replicate, expert_shard=shape.expert_shard, ep=shape.ep)
    meshes = meshes._replace(experts=mesh[(*replicas, "expert_shard")], ep=mesh["ep"])
    if shape.nodes == 1:
        return meshes
    mesh = mesh_of(ep_groups=shape.data_ranks // shape.ep, ep_across=shape.nodes, ep_within=shape.ep // shape.nodes)
    return meshes._replace(across=mesh["ep_across"], within=mesh["ep_within"])
