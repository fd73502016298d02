"""An experiment from its file to its table: what runs, what is skipped, what survives, and what is reported."""

import json
import os
import shlex
import sys
from types import SimpleNamespace

import pytest
from torch.utils.tensorboard import SummaryWriter

from dsv3_lightning.cli import main
from dsv3_lightning.planning.flops import training_flop_per_token
from dsv3_lightning.planning.memory import cache_per_token
from dsv3_lightning.planning.parameters import count_parameters
from dsv3_lightning.studies.compare import PANELS, curves_by_group, find_runs, grouped, markdown_table, spread
from dsv3_lightning.studies.experiment import Experiment
from tests.conftest import QUIET, ROOT

EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs/experiments").glob("*.yaml"))
TEXT = """
config: [nano]
seeds: [1, 2]
common: {trainer: {max_steps: 2, val_check_interval: 2, limit_val_batches: 1}, callbacks: {sample_text: null}}
variants:
  plain: {}
  broken: {callbacks: {fails: {class_path: tests.runs.poison.Exit}}}
"""


@pytest.fixture
def words(tmp_path, data_cache):
    (tmp_path / "mine.yaml").write_text(TEXT)
    return [str(tmp_path / "mine.yaml"), f"run.dir={tmp_path / 'runs'}", *data_cache, *QUIET]


@pytest.mark.slow
def test_a_failed_variant_stops_no_other_and_what_is_finished_is_skipped(tmp_path, words, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert main(["sweep", *words, "--jobs", "2"]) == 1
    out, err = capsys.readouterr()
    folder = tmp_path / "runs/mine"
    assert "failed: broken-seed1, broken-seed2" in err and "poisoned on purpose" in out
    reports = {path.parent.name: path.read_text() for path in folder.glob("*/report.json")}
    assert sorted(reports) == ["plain-seed1", "plain-seed2"]
    losses = {name: json.loads(text)["val_loss"] for name, text in reports.items()}
    assert losses["plain-seed1"] != losses["plain-seed2"]  # the seeds are in force

    assert main(["sweep", *words, "--task", "1"]) == 0
    assert "plain-seed2: finished before, loss" in capsys.readouterr().out
    assert main(["sweep", *words, "optimizer.lr=0.5", "--task", "1"]) == 1  # its name is taken by another experiment
    out, err = capsys.readouterr()
    assert "plain-seed2: failed" in out and "optimizer.lr: " in out and "0.5 here" in out and "plain-seed2" in err
    assert (folder / "plain-seed2/report.json").read_text() == reports["plain-seed2"]

    markdown, plot = tmp_path / "table.md", tmp_path / "curves.png"
    assert main(["compare", str(folder), "--markdown", str(markdown), "--plot", str(plot)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["plain", "2"] and spread(list(losses.values())) in lines[1]
    assert markdown.read_text().startswith("| variant | seeds | val loss |") and plot.stat().st_size > 10_000

    figure = curves_by_group(grouped(find_runs([folder])))
    assert [axes.get_title() for axes in figure.axes] == list(PANELS.values())  # nano has something of each
    assert all(len(axes.lines) == len(axes.collections) == 1 for axes in figure.axes)  # a mean and a band
    ends = sorted(json.loads(text)["val_bpb"] for text in reports.values())
    band = figure.axes[list(PANELS).index("val/bpb")].collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == pytest.approx(ends, rel=1e-6)


def test_a_variant_has_one_colour_and_what_nobody_measured_no_panel(tmp_path):
    runs = {"plain": [["val/loss"]], "guessing": [["val/loss", "mtp/acceptance_1"]] * 2}
    groups = {}
    for label, seeds in runs.items():
        for seed, tags in enumerate(seeds, start=1):
            folder = tmp_path / f"{label}-seed{seed}"
            with SummaryWriter(str(folder)) as writer:
                for tag in tags:
                    writer.add_scalar(tag, seed, 10)
                    writer.add_scalar(tag, seed, 20)
            groups.setdefault(label, []).append(SimpleNamespace(folder=folder))
    figure = curves_by_group(groups)
    loss, kept = figure.axes
    assert [line.get_label() for line in loss.lines] == ["plain", "guessing"]
    assert kept.lines[0].get_label() == "guessing" and kept.lines[0].get_color() == loss.lines[1].get_color()
    assert kept.lines[0].get_ydata().tolist() == [1.5, 1.5]
    assert [text.get_text() for text in figure.legends[0].texts] == ["plain", "guessing"]
    (alone,) = curves_by_group(groups, leave_out=("val/loss",)).axes
    assert alone.get_title() == kept.get_title()


@pytest.mark.slow
def test_a_slurm_array_has_a_task_per_run_and_runs_nothing(tmp_path, words, capsys):
    assert main(["sweep", *words, "--slurm"]) == 0
    script = capsys.readouterr().out
    assert "--array=0-3\n" in script and "--task $SLURM_ARRAY_TASK_ID" in script and words[1] in script
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_sweep_that_is_refused_leaves_no_folder(tmp_path, words, capsys):
    assert main(["sweep", *words, "--task", "9"]) == 2
    (tmp_path / "mine.yaml").write_text(TEXT + "  wrong: {model: {hiden_size: 1}}\n")
    assert main(["sweep", *words]) == 2
    assert "wrong-seed1: model.hiden_size: no such key" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_slurm_script_survives_spaces_and_its_log_needs_no_new_folder(tmp_path, words, monkeypatch, capsys):
    """The command, read by a shell, is the words of the user."""
    here = tmp_path / "my work"
    here.mkdir()
    (here / "two words.yaml").write_text(TEXT)
    monkeypatch.chdir(here)
    assert main(["sweep", "two words.yaml", f"run.dir={tmp_path / 'the runs'}", *words[2:], "--slurm"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert shlex.split(lines[-2]) == ["cd", str(here)]
    command = shlex.split(lines[-1].replace("$SLURM_ARRAY_TASK_ID", "3"))
    given = ["two words.yaml", f"run.dir={tmp_path / 'the runs'}", *words[2:]]
    assert command == ["exec", sys.executable, "-m", "dsv3_lightning", "sweep", *given, "--task", "3"]
    (log,) = [line.partition("--output=")[2] for line in lines if "--output=" in line]
    assert "/" not in log
    assert os.listdir(here) == ["two words.yaml"] and not (tmp_path / "the runs").exists()


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        ("config: [nano]\nvariants: {a: {}}\n", "seeds: missing"),
        ("config: [nano]\nseeds: []\nvariants: {a: {}}\n", "seeds: must not be empty"),
        ("config: [nano]\nseeds: [1, 1]\nvariants: {a: {}}\n", "seeds=[1, 1]: must not repeat a seed"),
        (
            "config: [nano]\nseeds: [1]\nvariants: {1e3: {}}\n",
            "variants.1000.0: a name must be text, in quotes where it reads like a number",
        ),
        ("config: [nano]\nseeds: [1]\nvariants: {a b: {}}\n", "variants.a b: must be usable as a folder"),
        (
            "config: [nano]\nseeds: [1]\nvariants: {a: {model: {hiden_size: 1}}}\n",
            "a-seed1: model.hiden_size: no such key",
        ),
        ("config: [nope]\nseeds: [1]\nvariants: {a: {}}\n", "nope: no such file"),
        ("config: [nano]\nseed: [1]\nvariants: {a: {}}\n", "seed: no such key; did you mean seeds?"),
    ],
)
def test_a_wrong_experiment_is_named_before_anything_runs(tmp_path, capsys, text, reported):
    (tmp_path / "wrong.yaml").write_text(text)
    assert main(["sweep", str(tmp_path / "wrong.yaml"), f"run.dir={tmp_path}"]) == 2
    err = capsys.readouterr().err
    assert reported in err and err.count("\n") == 1


def test_wrong_words_are_named(tmp_path, words, capsys):
    for arguments, reported in [
        (["sweep", "balanse"], "did you mean balance?"),
        (["sweep", *words, "--task", "9"], "--task 9: mine.yaml has runs 0 to 3"),
        (["sweep", *words, "--jobs", "0"], "--jobs"),
        (["compare", str(tmp_path)], "holds no finished run"),
    ]:
        assert main(arguments) == 2
        assert reported in capsys.readouterr().err


def test_spread_and_markdown():
    assert spread([1.0, 1.5, 2.0], "{:.2f}") == "1.50 ± 0.50" and spread([1.0], "{:.2f}") == "1.00"
    assert markdown_table([["a", "b"], ["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_shipped_experiment_passes_all_checks_with_at_least_three_seeds(tmp_path, name):
    experiment = Experiment(name, [f"run.dir={tmp_path}"])
    assert len(experiment.plan.seeds) >= 3 and len(experiment.tasks()) >= 6


def shapes(tmp_path, name):
    experiment = Experiment(name, [f"run.dir={tmp_path}"])
    models = {}
    for task in experiment.tasks():
        if task.name.endswith("-seed1"):
            models[task.name.removesuffix("-seed1")] = task.config.model
    return models


@pytest.mark.slow
def test_moe_and_attention_are_compared_at_equal_size(tmp_path):
    moe = shapes(tmp_path, "moe")
    for count in (lambda m: count_parameters(m).total, lambda m: training_flop_per_token(m, 256)):
        assert count(moe["fine_grained"]) == pytest.approx(count(moe["gshard_like"]), rel=5e-3)
    attention = shapes(tmp_path, "attention")
    weights = {name: count_parameters(m).main["attention"].total / 3 for name, m in attention.items()}
    assert weights == {"mla": 82_944, "mha": 81_920, "gqa_2": 82_944, "mqa": 81_920}
    assert {name: cache_per_token(m) / 3 for name, m in attention.items()} == {
        "mla": 64,
        "mha": 160,
        "gqa_2": 108,
        "mqa": 64,
    }
    mtp = shapes(tmp_path, "mtp")
    assert len({count_parameters(m).main_model for m in mtp.values()}) == 1
