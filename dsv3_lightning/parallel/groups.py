"""The mesh as process groups."""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dsv3_lightning.parallel.mesh import MeshShape


def build_mesh(shape: MeshShape, device_type: str) -> DeviceMesh:
    """[dp_replicate, dp_shard]; [dp_shard] without replicas. Needs a default process group of `shape.ranks`."""
    assert dist.get_world_size() == shape.ranks
    sizes = (shape.dp_replicate, shape.dp_shard)
    mesh = init_device_mesh(device_type, sizes, mesh_dim_names=("dp_replicate", "dp_shard"))
    return mesh if shape.dp_replicate > 1 else mesh["dp_shard"]
