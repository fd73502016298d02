"""Which meshes fit: arithmetic alone."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.parallel.groups import build_meshes
from dsv3_lightning.parallel.mesh import MeshShape, StrategyConfig, mesh_shape
from tests.parallel.small import config


@pytest.mark.parametrize(
    ("settings", "ranks", "per_node", "shape"),
    [
        ({"kind": "fsdp2"}, 2048, 8, MeshShape(1, 2048, small_shard=8)),
        ({"kind": "hsdp"}, 2048, 8, MeshShape(256, 8)),
        ({"kind": "hsdp"}, 8, 8, MeshShape(1, 8)),
        ({"kind": "hsdp", "dp_shard": 64}, 256, 8, MeshShape(4, 64, small_shard=8)),
        ({"kind": "fsdp2", "dp_replicate": 2}, 16, 8, MeshShape(2, 8)),
    ],
)
def test_sizes_left_open_are_filled_in(settings, ranks, per_node, shape):
    assert mesh_shape(StrategyConfig(**settings), ranks, per_node) == shape


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dp_replicate": 3}, "strategy.dp_replicate=3: does not divide 8 processes; use 2 or 4"),
        ({"dp_shard": 3}, "use 2 or 4"),
        ({"dp_replicate": 2, "dp_shard": 8}, "with dp_replicate=2 it makes 16 processes, there are 8; use 4 or auto"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(settings, message):
    with pytest.raises(ConfigError) as error:
        mesh_shape(StrategyConfig(kind="fsdp2", **settings), 8, 8)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("dp_replicate", 0), ("dp_shard", -1), ("expert_parallel", 0), ("prefetch", -1), ("node_size", 0)],
)
def test_impossible_sizes_are_named(key, value):
    with pytest.raises(ConfigError, match=f"strategy.{key}={value}"):
        StrategyConfig(kind="fsdp2", **{key: value})


@pytest.mark.parametrize(
    ("settings", "ranks", "shape"),
    [
        ({"kind": "fsdp2_ep"}, 2048, MeshShape(1, 2048, 8, 8)),  # within a node of 8
        ({"kind": "fsdp2_ep"}, 4, MeshShape(1, 4, 4)),
        ({"kind": "fsdp2_ep", "expert_parallel": 64}, 2048, MeshShape(1, 2048, 64, 8, 8)),
        ({"kind": "fsdp2_ep", "expert_parallel": 64, "deduplicate": False}, 2048, MeshShape(1, 2048, 64, 8)),
        ({"kind": "fsdp2_ep", "expert_parallel": 64, "node_size": 16}, 2048, MeshShape(1, 2048, 64, 16, 4)),
        ({"kind": "hsdp", "expert_parallel": 4}, 16, MeshShape(2, 8, 4)),
        ({"kind": "fsdp2"}, 16, MeshShape(1, 16, 1, 8)),
    ],
)
def test_experts_are_spread_over_a_part_of_the_shards(settings, ranks, shape):
    model = config(n_routed_experts=256, hidden_size=7168, moe_intermediate_size=2048)
    found = mesh_shape(StrategyConfig(**settings), ranks, 8, model)
    assert found == shape and found.ep * found.expert_shard * found.dp_replicate == ranks


@pytest.mark.parametrize(
    ("node_size", "message"),
    [(7, "does not divide 24 processes; use 6 or 8"), (6, "must divide expert_parallel=8, so that an ep group fills")],
)
def test_nodes_that_no_group_fills_are_refused(node_size, message):
    strategy = StrategyConfig(kind="fsdp2_ep", expert_parallel=8, node_size=node_size)
    with pytest.raises(ConfigError) as error:
        mesh_shape(strategy, 24, 8, config())
    assert f"strategy.node_size={node_size}: {message}" in str(error.value)
    groups_end_within_nodes = mesh_shape(StrategyConfig(kind="fsdp2_ep", expert_parallel=8), 24, 6, config())
    assert groups_end_within_nodes.nodes == 1


@pytest.mark.parametrize(
    ("ep", "model", "message"),
    [
        (16, {}, "must divide dp_shard=24 and model.n_routed_experts=8; use 8"),
        (3, {}, "must divide dp_shard=24 and model.n_routed_experts=8; use 2 or 4"),
        (4, {}, "leaves 6 ranks per expert, which divide neither model.hidden_size=16 nor moe_intermediate_size=32"),
        (2, {"first_k_dense_replace": 1}, "the model has no experts; use 1 or auto"),
    ],
)
def test_experts_that_do_not_divide_are_refused_with_what_would(ep, model, message):
    with pytest.raises(ConfigError) as error:
        strategy = StrategyConfig(kind="fsdp2_ep", expert_parallel=ep)
        mesh_shape(strategy, 24, 8, config(**{"moe_intermediate_size": 32} | model))
    assert f"strategy.expert_parallel={ep}: " in str(error.value) and message in str(error.value)


def test_groups_of_the_mesh_wait_as_long_as_they_are_told():
    """torch gives them half an hour, or ten minutes under NCCL, whatever the default group has."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=5))
    try:
        groups = build_meshes(MeshShape(1, 1), "cpu", timedelta(seconds=77)).dense.get_all_groups()
        timeouts = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
        assert timeouts and set(timeouts) == {timedelta(seconds=77)}
    finally:
        dist.destroy_process_group()
