"""Evaluation while a model trains: curves, answers in the run's folder, and training as if it had not been there."""

import json

import pytest
import torch

from dsv3_lightning.callbacks import Evaluate
from dsv3_lightning.cli import main
from dsv3_lightning.errors import ConfigError
from tests.conftest import ROOT

TASKS = [str(ROOT / f"tests/evaluation/{name}.jsonl") for name in ("sums", "endings")]
STEPS = (
    "trainer.max_steps=3",
    "trainer.val_check_interval=3",
    "trainer.limit_val_batches=1",
    "callbacks.router_probe=null",
)


def test_curves_by_task_and_all_answers_while_training_keeps_its_bits(nano, capsys):
    plain = nano.run("plain", *STEPS)
    best = "callbacks.checkpoint={keep: 9, best_by: eval/endings/gold_bits_per_byte}"
    run = nano.run(
        "evaluated", *STEPS, f"callbacks.evaluate={{every_n_steps: 2, tasks: [{','.join(TASKS)}], limit: 2}}", best
    )
    assert run.code == 0
    shown = capsys.readouterr().out
    assert (
        "evaluation after step 2:  sums  gold bits per byte " in shown and "evaluation after step 3:  endings" in shown
    )
    curves, before = run.scalars(), plain.scalars()
    assert {tag: curves[tag] for tag in before if tag.startswith(("loss", "val/"))} == {
        tag: before[tag] for tag in before if tag.startswith(("loss", "val/"))
    }
    for name, weight in plain.weights(3).items():
        assert torch.equal(weight, run.weights(3)[name]), name
    assert curves["eval/sums/pass@1"] == ([2, 3], [0.0, 0.0])
    assert curves["eval/endings/gold_bits_per_byte"][1][0] > curves["eval/endings/gold_bits_per_byte"][1][1] > 0
    (line, _) = (run.folder / "evaluation/step=2/sums.jsonl").read_text().splitlines()
    assert json.loads(line)["answers"][0]["verdict"] in ("wrong", "unreadable")
    (best,) = (run.folder / "checkpoints").glob("best-step=3-lowest=*.ckpt")


def test_a_bad_task_is_one_line_before_the_run_begins(tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "2 + 3 ="}\n')
    assert main(["validate", "nano", f"callbacks.evaluate={{tasks: [{bad}]}}"]) == 2
    assert "bad.jsonl:1: answer=null: must be text" in capsys.readouterr().err
    assert main(["validate", "nano", "callbacks.evaluate={tasks: []}"]) == 2
    assert "callbacks.evaluate.tasks=[]: needs a jsonl file" in capsys.readouterr().err
    assert main(["validate", "nano", "callbacks.evaluate={}"]) == 2
    assert "callbacks.evaluate.tasks: missing" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="limit=0: must be at least 1"):
        Evaluate(tasks=TASKS, limit=0)
