"""Lightning's callbacks and loggers by class_path: each works in a run that resumes, or is refused before step 1."""

import csv
import importlib.util
import re

import pytest
import yaml
from lightning.pytorch import callbacks, loggers

from tests.conftest import ROOT

ROW = re.compile(r"^\| (\w+) \| (works|refused|needs `[\w-]+`) \|", re.MULTILINE)
TABLE = dict(ROW.findall((ROOT / "docs/lightning.md").read_text()))
NEEDED = {  # arguments without a default
    "EarlyStopping": {"monitor": "val/loss", "patience": 100},
    "ThroughputMonitor": {"batch_size_fn": "builtins.len"},
    "LambdaCallback": {"on_fit_start": "tests.runs.test_lightning.greet"},
    "OnExceptionCheckpoint": {"dirpath": "exceptions"},
    "ModelCheckpoint": {"monitor": "loss/main", "every_n_train_steps": 1, "save_top_k": 2, "save_last": True},
    "Timer": {"duration": "01:00:00:00"},
    "LearningRateMonitor": {"logging_interval": "step"},
    "BackboneFinetuning": {},
    "BasePredictionWriter": {},
    "GradientAccumulationScheduler": {"scheduling": {0: 2}},
    "ModelPruning": {"pruning_fn": "l1_unstructured"},
    "StochasticWeightAveraging": {"swa_lrs": 1e-4},
}
APART = ("WeightAveraging", "EMAWeightAveraging", "RichProgressBar", "TQDMProgressBar")  # of each kind a run has one
STEPS = (
    *("trainer.max_steps=5", "trainer.val_check_interval=2", "trainer.limit_val_batches=1"),
    *("callbacks.checkpoint.every_n_steps=1", "data.sequence_length=16"),
    "callbacks.stop_once={class_path: tests.runs.interrupting.StopOnce, init_args: {step: 3}}",
)


def greet(*_: object) -> None:
    print("hello from a LambdaCallback")


def flow(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10000).strip()


def callback(name: str, **more: object) -> str:
    path = f"lightning.pytorch.callbacks.{name}"
    return f"callbacks.their_{name}=" + flow({"class_path": path, "init_args": NEEDED.get(name, {}) | more})


def logger_block(name: str, folder: object) -> dict:
    folder_argument = {"save_dir": str(folder)} if name in ("CSVLogger", "TensorBoardLogger") else {}
    return {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": folder_argument}


def working(module: object) -> list[str]:
    return [name for name in module.__all__ if TABLE[name] == "works"]  # type: ignore[attr-defined]


def test_the_table_has_every_class_that_lightning_exports():
    assert set(TABLE) == {*callbacks.__all__, *loggers.__all__}


def test_what_works_does_so_in_one_run_that_is_stopped_and_resumes(nano, monkeypatch, capsys):
    monkeypatch.chdir(nano.base)
    names = [name for name in working(callbacks) if name not in APART]
    blocks = [logger_block(name, nano.base / name) for name in working(loggers)]
    settings = (*STEPS, *map(callback, names), f"trainer.logger={flow(blocks)}")
    assert nano.run("all", *settings).code == 130, capsys.readouterr().err
    run = nano.run("all", *settings)
    captured = capsys.readouterr()
    assert run.code == 0 and run.report()["steps"] == 5, captured.err
    assert "hello from a LambdaCallback" in captured.out and "Traceback" not in captured.err
    plain = nano.run("plain", *STEPS)
    assert plain.code == 130
    plain = nano.run("plain", *STEPS)
    assert run.scalars()["loss/main"] == plain.scalars()["loss/main"]  # none of them changes what is learned
    kept = {path.name for path in (run.folder / "checkpoints/their_ModelCheckpoint").iterdir()}
    assert "last.ckpt" in kept and len(kept) == 3
    assert {path.name for path in (run.folder / "checkpoints").glob("step=*.ckpt")} == {"step=4.ckpt", "step=5.ckpt"}
    assert (run.folder / "checkpoints/last.ckpt").resolve().name == "step=5.ckpt"
    logged = {}
    for version in ("version_0", "version_1"):  # one for each session, and none deletes the other's
        with open(nano.base / f"CSVLogger/lightning_logs/{version}/metrics.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("loss/main")]
        logged |= {int(row["step"]): pytest.approx(float(row["loss/main"])) for row in rows}
    steps, losses = run.scalars()["loss/main"]
    assert dict(zip(steps, losses, strict=True)) == logged


@pytest.mark.parametrize("names", [("WeightAveraging", "RichProgressBar"), ("EMAWeightAveraging", "TQDMProgressBar")])
def test_an_average_and_a_progress_bar_of_lightnings_work_in_a_run_that_resumes(nano, names, capsys):
    settings = (*STEPS, *map(callback, names), "callbacks.progress=null")
    assert nano.run("average", *settings).code == 130, capsys.readouterr().err
    run = nano.run("average", *settings)
    assert run.code == 0 and run.report()["steps"] == 5, capsys.readouterr().err
    assert nano.run("whole", *(word for word in settings if "stop_once" not in word)).code == 0
    assert run.scalars()["val/loss"] == nano.run("whole", *settings[:-1]).scalars()["val/loss"]


def test_a_file_that_lightning_would_resume_from_unasked_is_refused(nano, monkeypatch, capsys):
    """With an OnExceptionCheckpoint it looks for one, also where the run starts again."""
    monkeypatch.chdir(nano.base)
    (nano.base / "exceptions").mkdir()
    (nano.base / "exceptions/on_exception.ckpt").touch()
    assert nano.run("again", callback("OnExceptionCheckpoint")).code == 2
    assert "exceptions/on_exception.ckpt: Lightning would resume from it" in capsys.readouterr().err


def test_early_stopping_stops_the_run(nano):
    stop = callback("EarlyStopping", patience=1, min_delta=100.0)
    run = nano.run("stopping", *STEPS[:-1], "trainer.max_steps=50", stop)
    assert max(run.scalars()["loss/main"][0]) == 4  # the second validation is not better by 100


@pytest.mark.parametrize("name", [name for name, verdict in TABLE.items() if verdict == "refused"])
def test_what_cannot_work_is_one_line_before_the_run(name, nano, capsys):
    words = nano.arguments(name, (callback(name),))
    if name == "Logger":
        words[-1] = f"trainer.logger={flow(logger_block(name, ''))}"
    check_refused("validate", words, capsys, name)
    if name == "StochasticWeightAveraging":
        check_refused("run", words, capsys, name)


@pytest.mark.parametrize("name", [name for name, verdict in TABLE.items() if verdict.startswith("needs")])
def test_a_logger_without_its_package_names_it(name, nano, capsys, monkeypatch):
    package = TABLE[name].split("`")[1]
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    words = nano.arguments(name, (f"trainer.logger={flow(logger_block(name, ''))}",))
    check_refused("validate", words, capsys, f"{name} needs the package {package}, which is not installed")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            [callback("EarlyStopping", monitor="val/los")],
            "monitor=val/los: nothing of that name is logged; did",
        ),
        (
            [callback("ModelCheckpoint", monitor="balance/margin"), "callbacks.router_probe=null"],
            "balance/margin: nothing",
        ),
        (["trainer.logger=false"], "trainer.logger=false: the run's own curves are always written"),
        (["trainer.logger=3"], "trainer.logger=3: needs a class_path"),
        ([callback("TQDMProgressBar")], "callbacks.their_TQDMProgressBar: a run has one progress bar"),
        ([callback("WeightAveraging"), "strategy=fsdp2"], "callbacks.their_WeightAveraging: can't average sharded"),
        ([callback("ModelCheckpoint", dirpath="runs/x/checkpoints"), "run.dir=runs", "run.name=x"], "own checkpoints"),
        (
            [callback("Timer"), callback("Timer").replace("their_Timer", "other")],
            "callbacks.other: its saved state would have the same name as that of callbacks.their_Timer",
        ),
        (
            [f"trainer.logger={flow(logger_block('CSVLogger', 'x') | {'init_args': {'save_dir': 'x', 'version': 3}})}"],
            "trainer.logger.init_args.version=3: CSVLogger deletes",
        ),
        (
            [f"trainer.logger=[{flow(logger_block('CSVLogger', 'x') | {'init_args': {'folder': 'x'}})}]"],
            "trainer.logger[0].init_args.folder: no such argument of CSVLogger",
        ),
    ],
)
def test_what_cannot_be_together_is_one_line_before_the_run(words, expected, nano, capsys):
    check_refused("validate", nano.arguments("x", tuple(words)), capsys, expected)


def check_refused(verb, words, capsys, expected):
    from dsv3_lightning.cli import main

    assert main([verb, *words[1:]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dsv3: error: ") and error.count("\n") == 1 and expected in error, error
