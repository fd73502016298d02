"""Shares of a model: what the chunks of a pipeline have adds up to the whole."""

from dataclasses import replace

import pytest

from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.parallel.mesh import MeshShape, StrategyConfig
from dsv3_lightning.planning import parts, wires
from dsv3_lightning.planning.hardware import GPUS, Hardware
from dsv3_lightning.planning.layout import SETTING, WHAT_IF, Layout, Tiles, Work, now
from dsv3_lightning.planning.parameters import count_parameters, parameter_split
from dsv3_lightning.planning.share import Share, chunk_shares, share_parameters, small_parameters, together, whole_share

V3 = check(compose(["v3"]).tree).model
MODELS = [V3, replace(V3, num_nextn_predict_layers=3), check(compose(["llm-7b"]).tree).model]
MODELS.append(check(compose(["nano"], ["model.mtp_kind=parallel", "model.num_nextn_predict_layers=2"]).tree).model)


@pytest.mark.parametrize("model", MODELS)
def test_the_chunks_of_a_pipeline_have_all_parameters_once(model: ModelConfig):
    assert share_parameters(model, whole_share(model)) == parameter_split(model)
    split = [1, 2, model.num_hidden_layers - 3, 0]
    shares = chunk_shares(model, split)
    assert together(shares) == whole_share(model)
    assert [share.dense + share.moe for share in shares] == split
    found = [share_parameters(model, share) for share in shares]
    assert tuple(map(sum, zip(*found, strict=True))) == parameter_split(model)
    counted = count_parameters(model)
    small = sum(
        part[name].total for part in (counted.main, counted.mtp) for name in ("norms", "router") if name in part
    )
    assert sum(small_parameters(model, share) for share in shares) == small


def test_dense_layers_are_in_the_first_chunks():
    assert chunk_shares(V3, [2, 29, 30, 0]) == [
        Share(2, 0, 0, 0, 1), Share(1, 28, 0, 0, 0), Share(0, 30, 0, 0, 0), Share(0, 0, 1, 2, 0),
    ]  # fmt: skip


@pytest.mark.parametrize("fp8", [None, SETTING, WHAT_IF])
def test_the_seconds_of_the_chunks_add_up_by_part_and_by_pass(fp8: Tiles | None):
    mesh = MeshShape(1, 128, 64, nodes=8)
    code = replace(now("sm90", mesh), fp8=fp8)
    layout = Layout(mesh, StrategyConfig(kind="fsdp2_ep"), Work(4096, 2, 4096, "bf16", "full"), code, 1.15)
    hardware = Hardware(GPUS["h800"])
    shares = chunk_shares(V3, [3, 28, 30, 0])
    for each in (*parts.COMPUTE[:-1], wires.exchange):
        split = [part for share in shares for part in each(V3, hardware, replace(layout, share=share))]
        for part in each(V3, hardware, layout):
            same = [other for other in split if other.name == part.name]
            assert part.seconds == pytest.approx(sum(other.seconds for other in same))
            assert part.ways is not None and sum(part.ways) == pytest.approx(part.seconds)
            for i, seconds in enumerate(part.ways):
                assert seconds == pytest.approx(sum(other.ways[i] for other in same if other.ways))
