"""The dashboard shows what is logged, and doesn't grow with the model."""

import re

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.backend_context import _sort_and_reduce_to_hparams_limit

from dsv3_lightning import callbacks
from dsv3_lightning.callbacks.charts import QUESTIONS
from dsv3_lightning.callbacks.dashboard import VARIED, flatten, hparams_row, is_compared, layout, logging_callbacks
from dsv3_lightning.callbacks.settings import CLASSES
from dsv3_lightning.config.compose import PRESETS, compose
from dsv3_lightning.config.schema import check, to_tree
from dsv3_lightning.training.module import PretrainModule

EXPERIMENTS = PRESETS / "experiments"

SHORT = ("trainer.max_steps=2", "trainer.val_check_interval=1", "trainer.limit_val_batches=1")
RUNS = {
    "everything": ("callbacks.router_monitor.per_layer=true", "callbacks.weight_average={decay: 0.9}"),
    "no monitor, no speed": ("callbacks.router_monitor=null", "callbacks.throughput=null"),
    "no bias, no probe": ("callbacks.expert_bias=null", "callbacks.router_probe=null", "callbacks.balance_factor=null"),
    "no other losses": ("model.num_nextn_predict_layers=0", "loss.balance=none"),
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
    assert list(plain) == [
        "is it learning",
        "is it balanced",
        "is MTP helping",
        "is it fast",
        "which rank is it",
        "is it healthy",
    ]
    assert "is MTP helping" not in layout(settings("model.num_nextn_predict_layers=0"), 2)
    assert "which layer is it" in layout(settings("callbacks.router_monitor.per_layer=true"), 2)
    unwatched = layout(settings("callbacks.router_monitor=null", "callbacks.throughput=null"), 2)
    assert "is it fast" not in unwatched
    assert any("most attached pair of experts" in title for title in unwatched["is it balanced"])  # the probe's


def test_every_chart_is_declared_under_a_question_and_no_key_twice():
    keys = [key for charts in QUESTIONS.values() for key in charts]
    assert len(set(keys)) == len(keys)
    tree = settings("callbacks.router_monitor.per_layer=true", "callbacks.weight_average={decay: 0.9}")
    declared = {key for source in (*logging_callbacks(CLASSES), PretrainModule) for key in source.charts(tree, 2)}
    assert {key for key in declared if isinstance(key, str)} == set(keys)
    assert {key[0] for key in declared if isinstance(key, tuple)} <= set(QUESTIONS)


@pytest.mark.parametrize("chart", ["grad_norm", ("is it healthy", "norm of the weights"), "nowhere"])
def test_a_new_callbacks_charts_are_drawn_without_a_line_elsewhere(monkeypatch, chart):
    class WeightNorm:
        charts = staticmethod(lambda tree, origins: {chart: ["optimizer/weight_norm"]})

    monkeypatch.setitem(CLASSES, "weight_norm", "WeightNorm")
    monkeypatch.setattr(callbacks, "WeightNorm", WeightNorm, raising=False)
    tree = settings()
    off, tree["callbacks"]["weight_norm"] = layout(tree, 2), {}
    if chart == "nowhere":
        with pytest.raises(AssertionError, match="charts without a title: {'nowhere'}"):
            layout(tree, 2)
        return
    drawn = layout(tree, 2)["is it healthy"]
    title = chart[1] if isinstance(chart, tuple) else QUESTIONS["is it healthy"][chart]
    assert drawn[title][1][-1] == "optimizer/weight_norm" and drawn != off["is it healthy"]


def test_no_chart_has_curves_of_training_and_of_validation():
    """TensorBoard draws them in one color. Nor a balance loss with its factor together with one without."""
    for charts in layout(settings("callbacks.router_monitor.per_layer=true"), 2).values():
        for title, (_, tags) in charts.items():
            validation = [tag.startswith("val/") or "max_vio_global" in tag for tag in tags]
            assert all(validation) or not any(validation), title
            assert len({tag for tag in tags if tag.startswith("loss/balance")}) <= 1, title


def test_hparams_open_on_what_people_compare():
    """In the order that TensorBoard itself makes: those that differ, then by name."""
    base = yaml.safe_load((PRESETS / "base.yaml").read_text())
    tree = settings("callbacks.expert_bias.speed=0", "optimizer.weight_decay=0.2", "callbacks.balance_factor=null")
    summary, *_ = hparams_row(flatten(tree), flatten(base))
    experiment = metadata.parse_experiment_plugin_data(summary.value[0].metadata.plugin_data.content)
    _sort_and_reduce_to_hparams_limit(experiment)
    first = [info.name for info in experiment.hparam_infos if info.differs]
    assert [info.name for info in experiment.hparam_infos][: len(first)] == first
    assert first[0] == "callbacks.balance_factor" and {"callbacks.expert_bias.speed", "optimizer.lr"} < set(first)
    assert {"optimizer.weight_decay", "model.hidden_size", "data.batch_size", "trainer.max_steps"} < set(first)
    assert not {"run.name", "callbacks.expert_bias.by", "callbacks.sample_text.every_n_steps"} & set(first)
    plain = [key for key, value in flatten(settings()).items() if is_compared(key, value, flatten(base))]
    assert len(plain) < 40 and min(plain) == "callbacks.expert_bias.rule"


def test_what_experiments_vary_is_compared():
    for name in EXPERIMENTS.glob("*.yaml"):
        for variant in yaml.safe_load(name.read_text())["variants"].values():
            for key in flatten(variant or {}):
                assert key.startswith(("callbacks", *VARIED)), key


@pytest.mark.parametrize("preset", ["v3", "llm-7b"])
def test_any_model_has_a_layout(preset):
    tree = to_tree(check(compose([preset], []).tree))
    sizes = {question: len(charts) for question, charts in layout(tree, 2).items()}
    learning, health = {"is it learning": 4, "is it fast": 5}, {"is it healthy": 2}
    moe = {"is it balanced": 15, "is MTP helping": 4, "which rank is it": 5}
    assert sizes == learning | (moe if preset == "v3" else {"which rank is it": 4}) | health


def test_58_layers_have_the_charts_of_three():
    trees = [to_tree(check(compose(["v3"], words).tree)) for words in ([], ["model.num_hidden_layers=6"])]
    assert trees[0]["model"]["num_hidden_layers"] - trees[0]["model"]["first_k_dense_replace"] == 58
    assert layout(trees[0], 2) == layout(trees[1], 2)
    for tree in trees:
        tree["callbacks"]["router_monitor"]["per_layer"] = True
    assert layout(trees[0], 2) == layout(trees[1], 2)
