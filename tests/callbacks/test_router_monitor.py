"""What the monitors log is what their docstrings say, is right, and costs no gradient."""

import re

import pytest

from dsv3_lightning.callbacks import RouterMonitor, RouterProbe

SHORT = ("trainer.max_steps=4", "trainer.val_check_interval=2", "trainer.limit_val_batches=2")


def documented(callback: type, *prefixes: str) -> set[str]:
    """The names in a docstring that look like scalars; the monitor's are all of balance/."""
    names = re.findall(r"(?:balance/)?(\w+)", callback.__doc__)
    return {f"balance/{name}" for name in names if name.startswith(prefixes)}


def test_the_keys_logged_are_the_keys_documented(nano):
    run = nano.run("run", *SHORT, "callbacks.router_monitor.per_layer=true", "callbacks.router_monitor.every_n_steps=2")
    logged = {re.sub(r"_\d+$", "_", tag) for tag in run.scalars() if tag.startswith("balance/")}
    monitor = documented(
        RouterMonitor, "max_vio", "load_", "dead_", "group_load", "bias_spread", "bias_mean", "router_g"
    )
    probe = documented(RouterProbe, "margin", "groups_per", "coactivation_", "specialization")
    others = {"balance/bias_absmax", "balance/bias_speed", "balance/factor"}  # of callbacks of their own
    assert logged == (monitor - {"balance/load_statistics"}) | {tag for tag in probe if "margins" not in tag} | others


def test_the_numbers_agree_with_each_other(nano):
    run = nano.run("run", *SHORT, "callbacks.router_monitor.per_layer=true", "callbacks.expert_bias.centered=true")
    scalars = {tag: values for tag, (_, values) in run.scalars().items()}
    layers = [scalars[f"balance/max_vio_layer_{layer}"] for layer in range(3)]
    for step in range(4):
        assert scalars["balance/max_vio"][step] == pytest.approx(sum(vio[step] for vio in layers) / 3, rel=1e-6)
        assert scalars["balance/max_vio_worst"][step] == pytest.approx(max(vio[step] for vio in layers), rel=1e-6)
        # one step per log: the busiest expert's relative load is its violation + 1
        assert scalars["balance/load_max"][step] == pytest.approx(scalars["balance/max_vio"][step] + 1, rel=1e-6)
        assert scalars["balance/max_vio_micro"][step] == pytest.approx(scalars["balance/max_vio"][step], rel=1e-6)
        assert 0 <= scalars["balance/load_min"][step] <= scalars["balance/load_p50"][step]
        assert 0 < scalars["balance/router_grad_norm"][step] < scalars["optimizer/grad_norm"][step]
    assert scalars["balance/bias_mean"] == pytest.approx([0.0] * 4, abs=1e-8)
    assert 1 <= scalars["balance/groups_per_token"][0] <= 2 and scalars["balance/margin"][0] > 0
    assert run.report()["max_vio_global"] == pytest.approx(
        [scalars[f"balance/max_vio_global_layer_{layer}"][-1] for layer in range(3)], rel=1e-6
    )
    accepted = run.report()["mtp_acceptance"]
    assert accepted == pytest.approx([scalars["mtp/acceptance_1"][-1]]) and 0 <= accepted[0] <= 1


def test_micro_batches_have_their_own_larger_violation(nano):
    run = nano.run("run", *SHORT, "trainer.accumulate_grad_batches=4")
    scalars = run.scalars()
    assert scalars["balance/max_vio_micro"][1][0] > scalars["balance/max_vio"][1][0]
