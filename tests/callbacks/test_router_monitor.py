"""What the monitors log is what their docstrings say, is right, and costs no gradient."""

import re
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

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


def test_a_window_is_saved_as_its_sum_over_ranks_and_loaded_by_the_first(monkeypatch):
    """Two ranks that count alike save in mid-window; the step after that is logged by as many."""
    logged = {}
    monkeypatch.setattr("dsv3_lightning.callbacks.router_monitor.log_scalars", lambda _, values: logged.update(values))

    def rank(number, step=1):
        strategy = SimpleNamespace(reduce=lambda value, reduce_op: value + others, is_global_zero=number == 0)
        return SimpleNamespace(
            strategy=strategy,
            global_step=step,
            accumulate_grad_batches=1,
            is_last_batch=False,
            log_every_n_steps=2,
            loggers=[],
        )

    module = nn.Module()
    module.register_buffer("expert_bias", torch.zeros(2))
    saving = RouterMonitor(every_n_steps=100)
    saving.setup(rank(0), module, "fit")
    saving.on_train_batch_end(rank(0), module, {"expert_counts": torch.tensor([[3, 1]])}, None, 0)
    others = torch.tensor([3.0, 1.0, 0.5, 1.0])  # the other rank's counts, violation and micro-batches
    state = saving.state_dict()
    assert torch.equal(saving.window[0], torch.tensor([[3, 1]]))  # continues with its own
    first, second = RouterMonitor(every_n_steps=100), RouterMonitor(every_n_steps=100)
    for number, monitor in enumerate((first, second)):
        monitor.setup(rank(number), module, "fit")
        monitor.load_state_dict(state)
    assert first.window[0].tolist() == [[6, 2]] and second.window[0].tolist() == [[0, 0]]
    assert (first.micro_vio, first.micro_batches, second.micro_vio, second.micro_batches) == (1.0, 2, 0.0, 0)
    others = torch.tensor([0.0, 0.0, 2.0, 2.0, 0.0, 1.0])
    first.on_train_batch_end(rank(0, 2), module, {"expert_counts": torch.tensor([[2, 2]])}, None, 1)
    assert logged["balance/max_vio"] == 0.25 and logged["balance/max_vio_micro"] == 0.25
    assert logged["balance/load_max"] == pytest.approx(10 / 8) and first.recent == [0.5, 0.0]


def test_the_reports_58_layers_of_256_experts_need_no_more_curves_than_three_of_four(tmp_path):
    tags = {}
    for layers, experts in ((3, 4), (58, 256)):
        folder, module = tmp_path / str(layers), nn.Module()
        module.layers = nn.ModuleList(nn.Module() for _ in range(layers))
        for layer in module.layers:
            layer.register_buffer("expert_bias", torch.randn(experts))
        trainer = SimpleNamespace(
            strategy=SimpleNamespace(reduce=lambda value, reduce_op: value), is_global_zero=True, global_step=1,
            accumulate_grad_batches=1, is_last_batch=False, log_every_n_steps=1, lightning_module=module,
            loggers=[TensorBoardLogger(tmp_path, name="", version=str(layers))],
            callback_metrics={}, logged_metrics={}, progress_bar_metrics={},
        )  # fmt: skip
        monitor = RouterMonitor(every_n_steps=1)
        monitor.setup(trainer, module, "fit")
        counts_LE = torch.randint(0, 99, (layers, experts))
        monitor.on_train_batch_end(trainer, module, {"expert_counts": counts_LE}, None, 0)
        trainer.loggers[0].experiment.close()
        events = EventAccumulator(str(folder)).Reload()
        tags[layers] = {kind: events.Tags()[kind] for kind in ("scalars", "images", "histograms")}
        (image,) = events.Images("router/load")
    assert tags[3] == tags[58] and len(tags[58]["scalars"]) < 20
    assert tags[58]["images"] == ["router/load", "router/bias"] and len(tags[58]["histograms"]) == 2
    assert 600 <= image.height <= image.width <= 1200  # of the larger: a screen's worth
