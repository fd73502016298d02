"""What FP8 changes in a planned step, against numbers worked out by hand."""

import re
from dataclasses import replace

import pytest

from dsv3_lightning.cli import main
from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check
from dsv3_lightning.parallel.mesh import MeshShape, StrategyConfig
from dsv3_lightning.planning import passes, wires
from dsv3_lightning.planning.hardware import GPUS, Hardware
from dsv3_lightning.planning.layout import SETTING, WHAT_IF, Layout, Work, now
from tests.conftest import ROOT

V3 = check(compose(["v3"]).tree).model
HARDWARE, MESH = Hardware(GPUS["h800"]), MeshShape(1, 128, 64, nodes=8)
WORK = Work(4096, 1, 4096, "bf16", "none")
BF16 = Layout(MESH, StrategyConfig(kind="fsdp2_ep"), WORK, now("sm90", MESH))
FP8 = replace(BF16, code=replace(BF16.code, fp8=WHAT_IF))


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


def test_the_runs_own_setting_rounds_in_plain_torch_and_leaves_experts_and_exchange():
    own = replace(BF16, code=replace(BF16.code, fp8=SETTING))
    exact, tiled = seconds(V3, BF16), seconds(V3, own)
    assert exact["projections, dense layers"] / tiled["projections, dense layers"] == pytest.approx(1118 / 620)
    assert exact["shared experts"] / tiled["shared experts"] == pytest.approx(1118 / 620)
    names = set(exact) - {"projections, dense layers", "shared experts"}
    assert {name: tiled[name] for name in names} == {name: exact[name] for name in names}
    assert wires.exchange_bytes(own) == wires.exchange_bytes(BF16)
    # 53 bytes a number; 61 in columns; 70 to regroup it; attention's five products, three of shared experts
    inputs, outputs = 7168 + 1536 + 7168 + 512 + 128 * 128, 1536 + 128 * 192 + 576 + 128 * 256 + 7168
    found = passes.rounding(V3)
    assert found.attention == (53 * inputs, 70 * inputs + 114 * outputs)
    assert found.moe == (53 * (2 * 7168 + 2048), 70 * (2 * 7168 + 2048) + 114 * (2 * 2048 + 7168))
    attention = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    weights = 62 * attention + 3 * 3 * 7168 * 18432 + 59 * 3 * 7168 * 2048  # with the MTP module's
    moved = 4096 * (62 * sum(found.attention) + 3 * sum(found.dense) + 59 * sum(found.moe)) + 53 * weights
    assert tiled["tiles in FP8 and back"] == pytest.approx(moved / (0.8 * 3.35e12))
    again = replace(own, work=replace(WORK, policy="selective"))  # inputs and weights are rounded a second time
    more = 4096 * (62 * found.attention.forward + 3 * found.dense.forward + 59 * found.moe.forward) + 53 * weights
    assert seconds(V3, again)["tiles in FP8 and back"] == pytest.approx((moved + more) / (0.8 * 3.35e12))


def test_a_config_in_fp8_is_planned_as_it_runs(capsys: pytest.CaptureFixture[str]):
    """Its step has tiles of linear layers, and its activations are smaller; the flag is what isn't written yet."""
    words = ["plan", str(ROOT / "configs/cluster/v3-256.yaml"), "--gpus", "256", "--gpu", "h800"]

    def sums(*more: str) -> list[float]:
        assert main([*words, *more]) == 0
        shown = capsys.readouterr().out
        assert ("tiles in FP8 and back" in shown) == bool(more)
        return [
            float(re.search(pattern, shown)[1])
            for pattern in (r"checkpointing full +([\d.]+) GB", r"\nstep +([\d.]+) s")
        ]

    plain, own, flag = sums(), sums("compute.fp8=true"), sums("--fp8")
    assert own[0] != plain[0] == flag[0]  # what is kept follows the setting alone
    assert flag[1] < plain[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compute.fp8=emulated"], "compute.fp8=emulated: is for its numbers, and its time isn't planned; with --gpus"),
        (["compute.fp8=true", "--gpu", "a100"], "compute.fp8=true: is for Hopper alone; use --gpu h100, h200 or h800"),
        (["compute.fp8=true", "--dry-run"], "--dry-run: compute.fp8=true can't be counted without a GPU"),
    ],
)
def test_fp8_that_cannot_be_planned_is_refused_in_one_line(words: list[str], message: str, capsys):
    assert main(["plan", "nano", "--gpus", "1", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
