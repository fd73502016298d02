"""The dashboard shows what is logged, and doesn't grow with the model."""

import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from dsv3_lightning.callbacks.dashboard import layout
from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check, to_tree

SHORT = ("trainer.max_steps=2", "trainer.val_check_interval=1", "trainer.limit_val_batches=1")
RUNS = {
    "everything": ("callbacks.router_monitor.per_layer=true", "callbacks.weight_average={decay: 0.9}"),
    "no monitor, no speed": ("callbacks.router_monitor=null", "callbacks.throughput=null"),
    "no bias, no probe": ("callbacks.expert_bias=null", "callbacks.router_probe=null", "callbacks.balance_factor=null"),
    "no losses beside": ("model.num_nextn_predict_layers=0", "loss.balance=none"),
    "constant weight, one origin, no choice in the open groups": (
        *("callbacks.mtp_weight=null", "loss.mtp_weight=0.3", "data.paths=[CORPUS]"),
        *("model.n_group=8", "model.topk_group=2", "model.n_routed_experts=16", "model.num_experts_per_tok=4"),
    ),
}


def settings(*overrides):
    return to_tree(check(compose(["nano"], list(overrides)).tree))


def written_layout(run):
    """{question: {chart: tags}} as the run's event file has it, which is what TensorBoard reads."""
    events = EventAccumulator(str(run.folder)).Reload()
    (event,) = events.Tensors("custom_scalars__config__")
    categories = Layout.FromString(event.tensor_proto.string_val[0]).category
    return {one.title: {chart.title: list(chart.multiline.tag) for chart in one.chart} for one in categories}


@pytest.mark.parametrize("name", RUNS)
def test_every_chart_has_its_curves_and_every_curve_its_chart(nano, name):
    corpus = nano.common[0].removeprefix("data.paths=[").split(",")[0]
    run = nano.run("run", *SHORT, *(word.replace("CORPUS", corpus) for word in RUNS[name]))
    logged = set(run.scalars())
    charts = [tags for question in written_layout(run).values() for tags in question.values()]
    patterns = [tag for tags in charts for tag in tags]
    assert [pattern for pattern in patterns if not any(re.match(pattern, tag) for tag in logged)] == []
    assert [tag for tag in logged if not any(re.match(pattern, tag) for pattern in patterns)] == []


def test_curves_do_not_multiply_with_layers_and_experts(nano):
    few = nano.run("few", *SHORT).scalars().keys()
    many = nano.run("many", *SHORT, "model.num_hidden_layers=6", "model.n_routed_experts=32").scalars().keys()
    assert few == many


def test_only_what_a_run_has_is_asked():
    plain = layout(settings(), 2)
    assert list(plain) == ["is it learning", "is it balanced", "is MTP helping", "is it fast", "is it healthy"]
    assert "is MTP helping" not in layout(settings("model.num_nextn_predict_layers=0"), 2)
    assert "which layer is it" in layout(settings("callbacks.router_monitor.per_layer=true"), 2)
    unwatched = layout(settings("callbacks.router_monitor=null", "callbacks.throughput=null"), 2)
    assert "is it fast" not in unwatched
    assert "most attached pair of experts (1 is chance)" in unwatched["is it balanced"]  # the probe's


@pytest.mark.parametrize("preset", ["v3", "llm-7b"])
def test_any_model_has_a_layout(preset):
    tree = to_tree(check(compose([preset], []).tree))
    sizes = {question: len(charts) for question, charts in layout(tree, 2).items()}
    learning, health = {"is it learning": 3, "is it fast": 5}, {"is it healthy": 2}
    assert sizes == learning | ({"is it balanced": 13, "is MTP helping": 3} if preset == "v3" else {}) | health


def test_58_layers_have_the_charts_of_three():
    trees = [to_tree(check(compose(["v3"], words).tree)) for words in ([], ["model.num_hidden_layers=6"])]
    assert trees[0]["model"]["num_hidden_layers"] - trees[0]["model"]["first_k_dense_replace"] == 58
    assert layout(trees[0], 2) == layout(trees[1], 2)
    for tree in trees:
        tree["callbacks"]["router_monitor"]["per_layer"] = True
    assert layout(trees[0], 2) == layout(trees[1], 2)
