"""A run that resumes with other settings: each change has its meaning, or is refused by name, on every road."""

import pytest
import torch
import yaml

from dsv3_lightning.parallel.checkpoints.names import step_files
from dsv3_lightning.runs.changes import ALWAYS, NEVER, NEW_NAME, SAME_DATA, changed_arguments, rule, table
from dsv3_lightning.training.config import Phase
from dsv3_lightning.training.schedule import lr_factor
from tests.conftest import ROOT
from tests.runs.compare import assert_same_curves
from tests.runs.test_stops import poison

KEEP = "callbacks.checkpoint={every_n_steps: 2, keep: 9, keep_best: 0}"
PHASES = [Phase(until=0.5, shape="constant", to=1.0), Phase(until=1.0, shape="cosine", to=0.0)]
PHASES_TEXT = "optimizer.phases=[{until: 0.5, shape: constant, to: 1.0}, {until: 1.0, shape: cosine, to: 0.0}]"
COMMON = ("trainer.max_steps=8", "trainer.limit_val_batches=0", "optimizer.warmup_steps=2", KEEP, PHASES_TEXT)


@pytest.fixture(scope="module")
def base(shared):
    """A run of 8 steps with a checkpoint after every other."""
    run = shared.run("base", *COMMON)
    assert run.code == 0
    return run


def resume(base, step: int = 4) -> str:
    return f"run.resume={base.folder / f'checkpoints/step={step}.ckpt'}"


def rates(run) -> dict[int, float]:
    return dict(zip(*run.scalars()["optimizer/lr"], strict=True))


def test_a_longer_run_follows_its_own_schedule_from_the_first_step_on(shared, base):
    """seen: the first step has the old length's rate, and the second the new one's."""
    longer = shared.run("longer", *COMMON, "trainer.max_steps=12", resume(base))
    assert rates(base)[6] == pytest.approx(3e-3 * lr_factor(5, 8, 2, PHASES))
    expected = {step: 3e-3 * lr_factor(step - 1, 12, 2, PHASES) for step in range(5, 13)}
    assert rates(longer) == pytest.approx(expected)


def test_what_is_new_of_the_optimizer_holds_from_the_first_step_on_and_is_what_is_recorded(shared, base):
    new = {"lr": 5e-3, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.3}
    words = [f"optimizer.{name}={value}" for name, value in new.items()]
    run = shared.run("tuned", *COMMON, *words, resume(base))
    assert rates(run)[5] == pytest.approx(5e-3 * lr_factor(4, 8, 2, PHASES))
    matrices, norms = torch.load(run.folder / "checkpoints/step=6.ckpt")["optimizer_states"][0]["param_groups"]
    assert (list(matrices["betas"]), matrices["eps"], matrices["weight_decay"]) == ([0.8, 0.9], 1e-6, 0.3)
    assert (list(norms["betas"]), norms["eps"], norms["weight_decay"]) == ([0.8, 0.9], 1e-6, 0.0)
    assert (
        yaml.safe_load((run.folder / "config.yaml").read_text())["optimizer"] | new
        == yaml.safe_load((run.folder / "config.yaml").read_text())["optimizer"]
    )


def test_nothing_changed_is_the_same_run(shared, base):
    branch = shared.run("branch", *COMMON, resume(base))
    assert_same_curves(base, branch, 0.0, after=4)


def test_other_losses_and_callbacks_hold_from_the_first_step_on(shared, base):
    words = ("loss={balance: [sequence, batch], balance_factor: [0.01, 0.02]}", "callbacks.expert_bias.speed=0.5")
    run = shared.run("other", *COMMON, *words, "callbacks.weight_average={decay: 0.9}", resume(base))
    assert run.code == 0
    assert run.scalars()["loss/balance_batch"][0] == [5, 6, 7, 8]
    assert run.scalars()["balance/bias_speed"][1][0] == 0.5


REFUSED = {
    "model.hidden_size": "128",
    "model.rope_theta": "1e6",
    "run.seed": "2",
    "data.batch_size": "16",
    "data.mask_document_ends": "true",
    "data.validation_fraction": "0.5",
    "trainer.precision": "bf16-mixed",
    "callbacks.skewed_start": "{strength: 0.5}",
    "trainer.max_steps": "3",
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_cannot_change_is_refused_by_name_and_leaves_nothing_behind(shared, base, key, capsys):
    capsys.readouterr()
    assert shared.run("refused", *COMMON, f"{key}={REFUSED[key]}", resume(base)).code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and key in error and "run.resume=" in error
    assert not (shared.base / "runs/refused").exists()


def test_arguments_that_somebody_elses_callback_holds_in_its_state_cannot_change_in_silence():
    """seen: EarlyStopping takes its patience from the checkpoint."""

    def early(patience: int) -> dict:
        return {
            "early": {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"patience": patience}}
        }

    assert changed_arguments(early(1), {"EarlyStopping{'monitor': 'val/loss'}"}, early(2)) == {
        "callbacks.early.init_args": ({"patience": 1}, {"patience": 2})
    }
    assert not changed_arguments(early(1), {"EarlyStopping"}, early(1))
    assert not changed_arguments(early(1), {"EarlyStopping"}, {"early": None})
    assert not changed_arguments(early(1), {"RunReport"}, early(2))


def test_a_run_that_began_from_a_path_resumes_from_its_own_newest_checkpoint(shared, base, capsys):
    words = (*COMMON, resume(base, 2), poison("Raise", moments=[[5, "on_train_batch_start"]]))
    with pytest.raises(SystemExit):
        shared.run("begun", *words)
    capsys.readouterr()
    run = shared.run("begun", *words)
    assert "continuing after step 4" in capsys.readouterr().out
    assert_same_curves(base, run, 0.0, after=2)
    assert shared.run("begun", *words).code == 0
    assert "this run is finished" in capsys.readouterr().out


def test_a_run_with_checkpoints_of_its_own_does_not_resume_from_another_runs(shared, base, capsys):
    run = shared.run("own", *COMMON)
    capsys.readouterr()
    assert shared.run("own", *COMMON, resume(base)).code == 2
    assert f"{run.folder} has checkpoints of its own; resume=auto continues from them" in capsys.readouterr().err


def test_a_run_that_is_taken_back_puts_later_checkpoints_away_and_resumes_from_there(shared, base, capsys):
    run = shared.run("back", *COMMON)
    words = (*COMMON, resume(run, 2))
    assert shared.run("back", *words).code == 0
    assert "continuing after step 2" in capsys.readouterr().out
    assert [path.name for path in step_files(run.folder / "set_aside")] == ["step=8.ckpt", "step=6.ckpt", "step=4.ckpt"]
    assert shared.run("back", *words).code == 0
    assert "this run is finished" in capsys.readouterr().out
    assert_same_curves(base, run, 0.0)


def leaves(tree, key=""):
    if not isinstance(tree, dict) or not tree:
        return [key]
    return [leaf for name in tree for leaf in leaves(tree[name], f"{key}.{name}".lstrip("."))]


def test_every_setting_has_its_rule_and_the_documentation_shows_the_table():
    base = yaml.safe_load((ROOT / "configs/base.yaml").read_text(encoding="utf-8"))
    assert {rule(key).road for key in leaves(base)} == {ALWAYS, SAME_DATA, NEW_NAME, NEVER}
    assert rule("data.num_workers").road == ALWAYS and rule("data.paths").road == SAME_DATA
    assert rule("data.sequence_length").road == rule("model.vocab_size").road == NEVER
    assert rule("callbacks.skewed_start.strength").road == NEVER and rule("callbacks.mine").road == NEW_NAME
    assert table() in (ROOT / "docs/resuming.md").read_text(encoding="utf-8")
