"""What FP8 changes in a planned step, against numbers worked out by hand."""

from dataclasses import replace

import pytest

from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check
from dsv3_lightning.parallel.mesh import MeshShape, StrategyConfig
from dsv3_lightning.planning import passes, wires
from dsv3_lightning.planning.hardware import GPUS, Hardware
from dsv3_lightning.planning.layout import Layout, Work, now

V3 = check(compose(["v3"]).tree).model
HARDWARE, MESH = Hardware(GPUS["h800"]), MeshShape(1, 128, 64, nodes=8)
WORK = Work(4096, 1, 4096, "bf16", "none")
BF16 = Layout(MESH, StrategyConfig(kind="fsdp2_ep"), WORK, now("sm90", MESH))
FP8 = replace(BF16, code=replace(BF16.code, fp8=True))


def seconds(model, layout) -> dict[str, float]:
    return {part.name: part.seconds for part in wires.parts(model, HARDWARE, layout)}


def test_products_are_faster_but_for_heads_and_routers():
    exact, tiled = seconds(V3, BF16), seconds(V3, FP8)
    assert exact["routed experts"] / tiled["routed experts"] == pytest.approx(1216 / 480)
    assert exact["projections, dense layers"] / tiled["projections, dense layers"] == pytest.approx(1118 / 620)
    same = ("attention", "output head and loss", "routers, in fp32", "norms, rotations, activations", "optimizer")
    assert [tiled[name] for name in same] == [exact[name] for name in same]


def test_tokens_travel_as_tiles_to_the_experts_and_as_bf16_back():
    assert tuple(wires.exchange_bytes(BF16)) == (2, 2, 0, 4)
    tile = 1 + 4 / 128
    assert tuple(wires.exchange_bytes(FP8)) == (tile, 2, 0, tile + 2)
    full = replace(FP8, work=replace(WORK, policy="full"))  # sent to the experts again
    assert tuple(wires.exchange_bytes(full)) == (tile, 2, tile, tile + 2)
    moved = [wires.traffic(V3, HARDWARE, layout).tokens for layout in (BF16, FP8)]
    assert moved[1] / moved[0] == pytest.approx((2 * tile + 4) / 8)


def test_tiles_are_written_in_two_groupings():
    found = passes.quantization(V3, fused=False, imbalance=1.0)
    D, F = 7168, 18432
    assert found.dense.forward == 3 * (D + F)  # two bytes read, one written
    assert found.dense.backward == 2 * (D + F) + 2 * 3 * (D + 2 * F)
    fused = passes.quantization(V3, fused=True, imbalance=1.0)
    assert fused.dense == (D + F, 2 * (D + F) + 2 * (D + 2 * F))
    inputs = D + 1536 + 512 + 128 * 128
    outputs = D + 1536 + 128 * 192 + 576 + 128 * 256
    assert found.attention == (3 * inputs, 2 * inputs + 6 * outputs)
    K, F, D = 8, 2048, 7168
    assert found.moe.forward == 3 * (D + K * F + F)  # a token once, before it travels
    assert found.moe.backward == 2 * (K * (D + F) + D + F) + 6 * (K * (2 * F + D) + D + 2 * F)
