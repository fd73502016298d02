"""Which meshes fit: arithmetic alone."""

import pytest

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.parallel.mesh import MeshShape, StrategyConfig, mesh_shape


@pytest.mark.parametrize(
    ("settings", "ranks", "per_node", "shape"),
    [
        ({"kind": "fsdp2"}, 2048, 8, MeshShape(1, 2048)),
        ({"kind": "hsdp"}, 2048, 8, MeshShape(256, 8)),
        ({"kind": "hsdp"}, 8, 8, MeshShape(1, 8)),
        ({"kind": "hsdp", "dp_shard": 64}, 256, 8, MeshShape(4, 64)),
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


@pytest.mark.parametrize(("key", "value"), [("dp_replicate", 0), ("dp_shard", -1), ("prefetch", -1)])
def test_impossible_sizes_are_named(key, value):
    with pytest.raises(ConfigError, match=f"strategy.{key}={value}"):
        StrategyConfig(kind="fsdp2", **{key: value})
