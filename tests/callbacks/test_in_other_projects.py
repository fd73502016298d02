"""Callbacks in somebody else's project: epochs, a short last step, no data module; what they lack is one line."""

import csv
import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from dsv3_lightning import callbacks
from dsv3_lightning.callbacks import (
    BalanceFactor,
    Checkpoint,
    Evaluate,
    ExpertBias,
    GarbageCollection,
    LossSpike,
    MemorySnapshot,
    MTPWeight,
    PipelineTrace,
    Progress,
    RouterMonitor,
    RouterProbe,
    RunReport,
    SampleText,
    SkewedStart,
    Throughput,
    WeightAverage,
)
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.parallel.checkpoints.names import best_files, step_files

EXPERTS, WIDTH, BATCHES, ACCUMULATE, EPOCHS = 4, 8, 5, 2, 3
STEPS = 3 * EPOCHS  # two full steps and a short one in each epoch


class Experts(nn.Module):
    """A hidden layer that chooses one of its experts; its router is a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))
        self.register_buffer("expert_bias", torch.zeros(EXPERTS))

    def forward(self, x):
        scores = self.router(x).sigmoid()
        chosen = (scores + self.expert_bias).argmax(1)
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        return outputs[range(len(x)), chosen] * scores[range(len(x)), chosen, None], chosen.bincount(minlength=EXPERTS)


class Regression(pl.LightningModule):
    """An ordinary module: it logs by `self.log`, and is built late, as Lightning recommends for large ones."""

    def __init__(self, *keys: str) -> None:
        super().__init__()
        self.keys, self.seen = keys, []

    def configure_model(self) -> None:
        self.moe = Experts()

    def training_step(self, batch, batch_idx):
        y, counts = self.moe(batch[0])
        self.seen.append((self.global_step, counts))
        outputs = {"expert_counts": counts[None], "tokens": len(y)}
        return {"loss": F.mse_loss(y, batch[0])} | {key: outputs[key] for key in self.keys}

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", F.mse_loss(self.moe(batch[0])[0], batch[0]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Dense(pl.LightningModule):
    """A module without anything that a callback could use."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader() -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(BATCHES * 4, WIDTH)), batch_size=4)


def fit(module: pl.LightningModule, folder, *used: pl.Callback, data=None, **arguments) -> pl.Trainer:
    defaults = {"max_epochs": EPOCHS, "accumulate_grad_batches": ACCUMULATE, "logger": False} | arguments
    trainer = pl.Trainer(
        accelerator="cpu", callbacks=list(used), default_root_dir=folder, enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in used),
        enable_progress_bar=any(isinstance(callback, Progress) for callback in used), **defaults,
    )  # fmt: skip
    trainer.fit(module, loader() if data is None else data, loader())
    return trainer


@pytest.fixture(autouse=True)
def seed():
    torch.set_num_threads(1)
    torch.manual_seed(1)


def test_they_run_together_through_epochs_with_short_last_steps(tmp_path, capsys):
    module, logger = Regression("expert_counts", "tokens"), CSVLogger(tmp_path)
    bias = ExpertBias(speed=1.0, schedule=[[0.0, 1.0], [0.5, 0.25]])
    used = (bias, RouterMonitor(), Throughput(), GarbageCollection(), MemorySnapshot(), Progress(), Checkpoint())
    trainer = fit(module, tmp_path, *used, logger=logger, log_every_n_steps=1)
    assert trainer.global_step == STEPS

    expected = torch.zeros(EXPERTS)
    for step in range(STEPS):
        counts = sum(counts for taken, counts in module.seen if taken == step)
        expected += (1.0 if step / STEPS < 0.5 else 0.25) * torch.sign(counts.sum() / EXPERTS - counts)
    assert torch.equal(module.moe.expert_bias, expected)

    rows = list(csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows if row["balance/max_vio"]] == list(range(1, STEPS + 1))
    names = set(rows[0])
    assert {"throughput/tokens_per_second", "throughput/memory_bytes", "balance/bias_absmax"} <= names
    for absent in ("throughput/mfu", "throughput/data_wait_share", "balance/router_grad_norm"):
        assert absent not in names

    folder = tmp_path / "checkpoints"
    assert [path.name for path in step_files(folder)] == [f"step={STEPS}.ckpt"]
    ((loss, best),) = best_files(folder)
    assert loss <= round(float(trainer.callback_metrics["val/loss"]), 4)
    printed = capsys.readouterr().out
    assert f"step {STEPS}/{STEPS}" in printed and "0:00 left" in printed and "stopped" not in printed
    assert printed.count("validation after step") == EPOCHS and f"loss {loss:.3f}" in printed

    again = Regression("expert_counts", "tokens")
    first = step_files(folder)[0]
    saved = torch.load(first, weights_only=True)
    assert saved["global_step"] == STEPS and torch.equal(saved["state_dict"]["moe.expert_bias"], expected)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=EPOCHS + 1, accumulate_grad_batches=ACCUMULATE, logger=False,
        callbacks=[ExpertBias(), Checkpoint()], default_root_dir=tmp_path, enable_model_summary=False,
        enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(again, loader(), loader(), ckpt_path=str(folder / "last.ckpt"), weights_only=True)
    assert trainer.global_step == STEPS + 3 and step_files(folder)[0].name == f"step={STEPS + 3}.ckpt"
    trainer.validate(again, loader(), verbose=False)


def test_training_of_unknown_length_works_without_schedules_by_share(tmp_path, capsys):
    class Endless(IterableDataset):
        def __iter__(self):
            return iter(torch.randn(6, WIDTH))

    endless = DataLoader(TensorRows(Endless()), batch_size=2)
    module = Regression("expert_counts")
    bias = ExpertBias(schedule=[[0, 1.0]], by="steps")
    fit(module, tmp_path, bias, Progress(), Checkpoint(every_n_steps=2), data=endless, log_every_n_steps=1)
    assert [path.name for path in step_files(tmp_path / "checkpoints")] == ["step=6.ckpt", "step=4.ckpt"]
    printed = capsys.readouterr().out
    assert "step 6\n" in printed and "stopped" not in printed
    message = "^ExpertBias has a schedule by=share, but the length of training is unknown; .*by=steps$"
    with pytest.raises(ConfigError, match=message):
        fit(Regression("expert_counts"), tmp_path, ExpertBias(), data=endless)


class TensorRows(IterableDataset):
    """Rows as a TensorDataset gives them."""

    def __init__(self, rows) -> None:
        self.rows = rows

    def __iter__(self):
        return ((row,) for row in self.rows)


LACKING = {
    BalanceFactor: "`balance.scale`",
    ExpertBias: "`expert_bias`",
    MTPWeight: "`mtp_weight`",
    RouterMonitor: "`expert_bias`",
    RouterProbe: "`model`",
    RunReport: "`model`",
    SampleText: "`model`",
    SkewedStart: "`expert_bias`",
    WeightAverage: "`model`",
}
TASKS = [str(Path(__file__).parents[1] / "evaluation/sums.jsonl")]
ARGUMENTS = {SkewedStart: {"strength": 0.5}, WeightAverage: {"decay": 0.9}, Evaluate: {"tasks": TASKS}}


@pytest.mark.parametrize("name", callbacks.__all__)
def test_each_callback_works_in_any_module_or_says_in_one_line_what_it_needs(tmp_path, name):
    """`LACKING` has what those lack that need something; others that refuse a module name it as they do."""
    kind = getattr(callbacks, name)
    try:
        fit(Dense(), tmp_path, kind(**ARGUMENTS.get(kind, {})))
    except ConfigError as error:
        assert re.match(rf"{name} needs [^\n]*$", str(error)), error
    else:
        assert kind not in LACKING


@pytest.mark.parametrize("kind", LACKING)
def test_what_a_module_lacks_is_one_line_before_the_first_step(tmp_path, kind):
    module = Dense()
    before = module.layer.weight.clone()
    with pytest.raises(ConfigError) as caught:
        fit(module, tmp_path, kind(**ARGUMENTS.get(kind, {})))
    line = str(caught.value)
    assert "\n" not in line and line.startswith(f"{kind.__name__} needs ")
    assert LACKING[kind] in line and "Dense" in line
    assert torch.equal(module.layer.weight, before)


@pytest.mark.parametrize("kind", [Evaluate, RouterProbe, RunReport, SampleText, WeightAverage])
def test_another_kind_of_model_is_named(tmp_path, kind):
    module = Dense()
    module.model = nn.Linear(1, 1)
    with pytest.raises(ConfigError, match=f"^{kind.__name__} needs .*`model`.*Transformer; in Dense it is a Linear$"):
        fit(module, tmp_path, kind(**ARGUMENTS.get(kind, {})))


@pytest.mark.parametrize(
    ("kind", "key"), [(ExpertBias, "expert_counts"), (RouterMonitor, "expert_counts"), (Throughput, "tokens")]
)
def test_a_key_that_training_step_does_not_return_is_named(tmp_path, kind, key):
    with pytest.raises(ConfigError, match=f"^{kind.__name__} needs the key `{key}` .*training_step of Regression"):
        fit(Regression(), tmp_path, kind())


def test_counts_that_do_not_fit_the_biases_are_shown(tmp_path):
    class TwoLayers(Regression):
        def configure_model(self) -> None:
            super().configure_model()
            self.moe.router.register_buffer("expert_bias", torch.zeros(EXPERTS))

    with pytest.raises(ConfigError, match=r"^ExpertBias .*TwoLayers: found \[1, 4\] for biases of \[4, 4\]$"):
        fit(TwoLayers("expert_counts"), tmp_path, ExpertBias())


@pytest.mark.parametrize("kind", [ExpertBias, MTPWeight, BalanceFactor])
def test_schedules_by_tokens_need_a_data_module_that_counts_them(tmp_path, kind):
    module = Regression("expert_counts")
    module.mtp_weight, module.balance = 0.0, type("Balance", (), {"scale": 1.0, "factors": {}})()
    with pytest.raises(ConfigError, match=f"^{kind.__name__} needs .*`tokens_before`.* no data module$"):
        fit(module, tmp_path, kind(by="tokens"))


def test_a_trace_needs_a_pipeline(tmp_path):
    with pytest.raises(ConfigError, match="^PipelineTrace needs a pipeline; set strategy.pipeline_parallel"):
        fit(Dense(), tmp_path, PipelineTrace())


def test_a_return_after_a_spike_needs_a_data_module_that_can_leave_samples_out(tmp_path):
    with pytest.raises(ConfigError, match="^LossSpike needs the attribute `skips` of the LightningDataModule, but the"):
        fit(Dense(), tmp_path, LossSpike())
