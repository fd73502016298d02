"""The dashboard shows what is logged, and doesn't grow with the model."""

import re

import pytest

from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check, to_tree
from dsv3_lightning.training.dashboard import layout

SHORT = ("trainer.max_steps=2", "trainer.val_check_interval=1", "trainer.limit_val_batches=1")
UNSHOWN = {"throughput/model_flops_per_second"}  # the same curve as tokens per second


def settings(*overrides):
    return to_tree(check(compose(["nano"], list(overrides)).tree))


def tags_of(charts):
    return [tag for _, tags in charts.values() for tag in tags]


@pytest.mark.parametrize("per_layer", ["false", "true"])
def test_every_chart_has_its_curves_and_every_curve_its_chart(nano, per_layer):
    override = f"callbacks.router_monitor.per_layer={per_layer}"
    logged = set(nano.run("run", *SHORT, override).scalars())
    patterns = [tag for charts in layout(settings(override)).values() for tag in tags_of(charts)]
    assert [pattern for pattern in patterns if not any(re.match(pattern, tag) for tag in logged)] == []
    assert {tag for tag in logged if not any(re.match(pattern, tag) for pattern in patterns)} == UNSHOWN


def test_curves_do_not_multiply_with_layers_and_experts(nano):
    few = nano.run("few", *SHORT).scalars().keys()
    many = nano.run("many", *SHORT, "model.num_hidden_layers=6", "model.n_routed_experts=32").scalars().keys()
    assert few == many


def test_only_what_a_run_has_is_asked():
    plain = layout(settings())
    assert list(plain) == ["is it learning", "is it balanced", "is MTP helping", "is it fast", "is it healthy"]
    assert "is MTP helping" not in layout(settings("model.num_nextn_predict_layers=0"))
    assert "is it balanced" not in layout(settings("callbacks.router_monitor=null"))
    assert "which layer is it" in layout(settings("callbacks.router_monitor.per_layer=true"))
