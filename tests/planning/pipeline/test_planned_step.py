"""Planned steps and memory of pipelines, against numbers worked out by hand and against a step without a pipeline."""

from dataclasses import replace

import pytest

from dsv3_lightning.common.schedules import SCHEDULES, placement
from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check
from dsv3_lightning.parallel.mesh import MeshShape, StrategyConfig
from dsv3_lightning.planning.activations import activations, widths_of
from dsv3_lightning.planning.coefficients import TABLE
from dsv3_lightning.planning.hardware import GPUS, Hardware
from dsv3_lightning.planning.layout import Layout, Work, now
from dsv3_lightning.planning.parts import Ways
from dsv3_lightning.planning.pipeline.actions import Action
from dsv3_lightning.planning.pipeline.memory import chunk_bytes, pipeline_memory, stage_memory
from dsv3_lightning.planning.pipeline.step import BUBBLE, TRANSFERS, Pipeline, pipeline_step
from dsv3_lightning.planning.pipeline.times import ChunkCost, PlannedTimes, beside, planned_times
from dsv3_lightning.planning.share import Share, chunk_shares, whole_share
from dsv3_lightning.planning.step import step
from dsv3_lightning.planning.wires import EXCHANGE

V3 = check(compose(["v3"]).tree).model
HARDWARE = Hardware(GPUS["h800"])
MESH = MeshShape(1, 128, 64, 8, 8)
WORK = Work(4096, 16, 4096, "bf16", "full", moment=2)
LAYOUT = Layout(MESH, StrategyConfig(kind="fsdp2_ep"), WORK, now("sm90", MESH), 1.15)
LAYERS = [8, *[8] * 6, 5]


def planned(schedule: str = "dualpipev", overlap: bool = False, layout: Layout = LAYOUT):
    return pipeline_step(V3, HARDWARE, layout, Pipeline(schedule, 4, LAYERS, overlap))


def test_passes_of_all_chunks_are_the_computing_and_the_exposed_exchange_of_a_step_without_a_pipeline():
    whole = {
        each.part.name: each
        for each in step(V3, HARDWARE, replace(LAYOUT, code=replace(LAYOUT.code, zero1=True))).exposed
    }
    times = planned_times(V3, HARDWARE, LAYOUT, chunk_shares(V3, LAYERS), overlap=False)
    passes = sum(times((Action(kind, chunk, 0),)) for chunk in range(8) for kind in "FB")
    computing = sum(each.seconds for each in whole.values() if each.part.ways)
    # a weight part of the shared experts has nothing to hide, so a little more of the exchange is exposed
    assert 16 * passes == pytest.approx(computing, rel=0.01) and 16 * passes >= computing


def test_a_pair_takes_the_longer_of_computing_and_exchange_where_they_overlap():
    cost = ChunkCost(Ways(3.0, 4.0, 2.0), Ways(1.0, 1.5, 0.0), Ways(0.5, 1.0, 0.0))
    pair = (Action("F", 0, 3), Action("B", 0, 1))
    apart, overlap = (PlannedTimes([cost], flag, kept=0.8) for flag in (False, True))
    assert apart(pair) == 3.5 + 5 + 2 == sum(apart((action,)) for action in pair)
    assert overlap(pair) == pytest.approx(9 + 0.2 * 2.5)
    assert overlap((Action("F", 0, 3),)) == 3.5 and overlap((Action("W", 0, 3),)) == 2
    assert beside(1.0, 2.5, 0.8) == 2.5


@pytest.mark.parametrize("schedule", ["zbv", "dualpipev"])
def test_the_step_is_the_span_of_the_timeline_and_what_is_done_once(schedule: str):
    found = planned(schedule)
    once = sum(each.seconds for each in found.step.exposed if not each.part.ways and each.part.hidden_under == ()
               and each.part.name != BUBBLE)  # fmt: skip
    assert found.step.seconds == pytest.approx(found.timeline.span + once, rel=1e-6)
    assert found.timeline.busy(found.busiest) == max(map(found.timeline.busy, range(4)))
    assert found.step.tokens == 4096 * 16 // 4
    names = {each.part.name for each in found.step.exposed}
    assert {EXCHANGE, BUBBLE, TRANSFERS, "optimizer"} <= names
    assert set(found.step.coefficients) <= set(TABLE)


def test_overlap_shortens_the_step_by_exposed_exchange_alone():
    apart, overlap = planned(), planned(overlap=True)
    exposed = [
        next(each.seconds for each in found.step.exposed if each.part.name == EXCHANGE) for found in (apart, overlap)
    ]
    assert exposed[1] < 0.6 * exposed[0] and overlap.step.seconds < apart.step.seconds
    others = [sum(each.seconds for each in found.step.exposed if each.part.ways) for found in (apart, overlap)]
    assert others[0] == pytest.approx(others[1])
    alone = replace(LAYOUT, mesh=MeshShape(1, 1))  # no exchange, nothing to overlap
    assert planned(overlap=True, layout=alone).step.seconds == pytest.approx(planned(layout=alone).step.seconds)


def test_a_stage_keeps_shards_and_holds_whole_parameters_and_gradients_in_a_step():
    own = Share(0, 4, 0, 0, 0)
    found = stage_memory(V3, replace(MESH, small_shard=None), WORK, own, 0.0)
    routed = 4 * 256 * 3 * 7168 * 2048
    dense = 4 * (187_107_328 + 2 * 7168 + 1536 + 512 + 3 * 7168 * 2048 + 256 * 7168)  # attention, norms, shared, router
    assert found.weights == found.gradients == pytest.approx(4 * (dense + routed) / 128)
    assert found.optimizer == pytest.approx(4 * (dense + routed) / 128)  # moments in bf16
    here = dense + routed / 64
    assert found.gathered == pytest.approx(2 * here + 4 * here + 2 * here / 4 - found.gradients, rel=0.01)


def test_activations_are_those_of_live_chunks():
    shares = chunk_shares(V3, LAYERS)
    each = [chunk_bytes(V3, WORK, share, 64) for share in shares]
    assert sum(chunk.activations for chunk in each) == activations(V3, 4096, "bf16", "full", 64).kept
    hidden = 4096 * 7168 * 2
    assert [chunk.between for chunk in each] == [2 * hidden] * 7 + [hidden]  # the embedding travels to the MTP module
    assert [chunk.loss for chunk in each] == [0.0] * 7 + [2 * 4 * 7168 * 129280]  # of each head
    # chunks 3 and 4 have 8 MoE layers each; inputs of products, and gradients of their outputs
    attention = 7168 + 1536 + 512 + 128 * 128 + (1536 + 128 * 192 + 576 + 128 * 256 + 7168)
    shared, expert = 7168 + 2048 + (2 * 2048 + 7168), 7168 + 2048 + (2 * 2048 + 7168)
    assert each[3].waiting == each[4].waiting == 4096 * 8 * 2 * (attention + shared + 8 * expert)
    again = widths_of(V3, "bf16", 64).micro_batch(shares[3], 4096, "full").made_again
    of_ranks = placement(SCHEDULES["zbv"], 4)
    timeline = pipeline_step(V3, HARDWARE, LAYOUT, Pipeline("zbv", 4, LAYERS, waiting=1)).timeline
    found = pipeline_memory(V3, MESH, WORK, shares, of_ranks, timeline)
    # rank 3 holds 8 of them at a time, one of which is in its input part, whose last of 8 layers computes again
    assert found[3].activations == pytest.approx(7 * each[3].total + each[3].waiting * 7 / 8 + again)


def test_a_pipeline_of_one_rank_is_a_step_without_one():
    whole = Pipeline("1f1b", 1, [61])
    found = pipeline_step(V3, HARDWARE, LAYOUT, whole)
    assert found.timeline.bubble_share == pytest.approx(0, abs=1e-9) and found.shares == [whole_share(V3)]
    assert found.step.flop == pytest.approx(step(V3, HARDWARE, LAYOUT).flop)
