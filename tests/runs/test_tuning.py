"""Runs with a `dpo` or a `grpo` section: what they learn, how they go on, and what stops them."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv3_lightning.cli import main
from dsv3_lightning.common.history import scalar_history
from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check
from dsv3_lightning.planning.memory import checkpoint_bytes
from dsv3_lightning.runs.generating import generation_notes
from dsv3_lightning.runs.record import stored_config
from dsv3_lightning.runs.space import copies
from tests.conftest import ROOT, blank_figures
from tests.forking import Forked
from tests.runs.tuning_files import SMALL, write_files

GRPO = (
    "{rewards: ['judges:last_digit'], group_size: 4, max_new_tokens: 6, beta: 0.05, reference_steps: 4, updates: 2, "
    "temperature: 0.7, clip: [1.0e-3, 1.0e-3]}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory, data_cache):
    """A folder with a run to start from, pairs, prompts and judges."""
    base = tmp_path_factory.mktemp("tuning")
    write_files(base)
    assert run(base, "start", *data_cache, "trainer.max_steps=2", "data.sequence_length=32") == 0
    return base


@pytest.fixture(autouse=True)
def here(base, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.chdir(base)


def run(base: Path, name: str, *settings: str) -> int:
    with blank_figures():
        return main(["run", "nano", f"run.dir={base / 'runs'}", f"run.name={name}", *SMALL, *settings])


def tuned(base: Path, name: str, kind: str, *settings: str) -> int:
    paths = {"dpo": "pairs", "grpo": "prompts"}[kind]
    return run(base, name, f"init_from={base / 'runs/start'}", f"data.paths=[{base / paths}.jsonl]", *settings)


def start(base: Path, name: str, kind: str, *settings: str, **environment: str) -> subprocess.Popen:
    """As `tuned`, in a process of its own."""
    words = [f"run.dir={base / 'runs'}", f"run.name={name}", *SMALL, f"init_from={base / 'runs/start'}",
             f"data.paths=[{base / {'dpo': 'pairs', 'grpo': 'prompts'}[kind]}.jsonl]", *settings]  # fmt: skip
    return Forked([sys.executable, "-m", "dsv3_lightning", "run", "nano", *words], cwd=base, stdout=subprocess.PIPE,
                  stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1",
                  "PYTHONPATH": os.pathsep.join((str(ROOT), str(base)))} | environment)  # fmt: skip


def ended(process: subprocess.Popen) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, output


def weights(base: Path, name: str, step: int) -> dict[str, torch.Tensor]:
    return torch.load(base / "runs" / name / f"checkpoints/step={step}.ckpt", weights_only=True)["state_dict"]


def assert_equal(a, b, tolerance=0.0):
    for name, value in a.items():
        torch.testing.assert_close(
            b[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def scalars(base: Path, name: str) -> dict[str, tuple[list[int], list[float]]]:
    return scalar_history(base / "runs" / name)


DPO = ["dpo={beta: 0.5}", "trainer.max_steps=8", "optimizer.lr=2e-3", "trainer.val_check_interval=4",
       "callbacks.checkpoint.every_n_steps=4"]  # fmt: skip


@pytest.fixture(scope="module")
def preferring(base):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(base)
        assert tuned(base, "dpo", "dpo", *DPO) == 0


def test_dpo_begins_at_the_logarithm_of_two_and_learns_to_prefer(base, preferring):
    found = scalars(base, "dpo")
    assert found["loss/main"][1][0] == pytest.approx(math.log(2), abs=1e-6)
    steps, losses = found["val/loss"]
    assert steps[0] == 0 and losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.5 and found["val/accuracy"][1][-1] == 1 and found["val/margin"][1][-1] > 0
    assert len(found["mtp/acceptance_1"][1]) == 3  # before, in the middle and at the end
    # from a checkpoint, which holds the reference, to the same bits
    assert tuned(base, "dpo_again", "dpo", *DPO,
                 f"run.resume={base / 'runs/dpo/checkpoints/step=4.ckpt'}") == 0  # fmt: skip
    assert_equal(weights(base, "dpo", 8), weights(base, "dpo_again", 8))
    # in other micro-batches the same step
    assert tuned(base, "dpo_parts", "dpo", *DPO, "trainer.accumulate_grad_batches=4") == 0
    assert_equal(weights(base, "dpo", 4), weights(base, "dpo_parts", 4), tolerance=2e-4)


def test_two_ranks_with_experts_spread_over_them_prefer_by_the_same_steps(base, preferring):
    code, output = ended(start(base, "dpo_ranks", "dpo", *DPO, *RANKS))
    assert code == 0, output
    assert_equal(weights(base, "dpo", 4), weights(base, "dpo_ranks", 4), tolerance=3e-4)
    ours, theirs = scalars(base, "dpo"), scalars(base, "dpo_ranks")
    for tag in ("val/loss", "val/accuracy", "val/margin", "dpo/margin", "loss/main"):
        assert ours[tag][1] == pytest.approx(theirs[tag][1], rel=1e-3, abs=1e-4), tag


def test_grpo_goes_on_to_the_same_bits_in_the_middle_of_what_it_sampled(base):
    settings = [f"grpo={GRPO}", "trainer.max_steps=6", "optimizer.lr=1e-3", "trainer.val_check_interval=6",
                "callbacks.checkpoint={every_n_steps: 1, keep: 9, best_by: val/reward, best_is: highest}",
                "data.batch_size=4"]  # fmt: skip
    assert tuned(base, "grpo", "grpo", *settings) == 0
    assert list((base / "runs/grpo/checkpoints").glob("best*"))  # by reward
    assert tuned(base, "grpo_again", "grpo", *settings,
                 f"run.resume={base / 'runs/grpo/checkpoints/step=5.ckpt'}") == 0  # fmt: skip
    assert_equal(weights(base, "grpo", 6), weights(base, "grpo_again", 6))
    parts = [*settings, "trainer.accumulate_grad_batches=4"]
    assert tuned(base, "grpo_parts", "grpo", *parts) == 0
    assert_equal(weights(base, "grpo", 2), weights(base, "grpo_parts", 2), tolerance=2e-4)
    # what the disk must hold is known before the first step: the reference is a copy of the weights
    config = stored_config(base / "runs/grpo")
    size = (base / "runs/grpo/checkpoints/step=6.ckpt").stat().st_size  # without answers still to learn from
    assert 0 < size - checkpoint_bytes(config.model, "32", False, 4, copies(config)) < 300_000
    found = scalars(base, "grpo")
    kl = dict(zip(*found["grpo/kl"]))
    assert kl[1] == pytest.approx(0, abs=1e-7) and kl[2] > 0  # the model is its own reference at first
    assert kl[5] < kl[4]  # replaced after step 4
    assert found["loss/main"][1][0] == pytest.approx(0, abs=1e-6) and found["optimizer/grad_norm"][1][0] > 0
    assert found["val/reward"][0] == [0, 6]
    # the second step of a sampling has another model than sampled: its ratios differ from 1, and are clipped
    low, high = (dict(zip(*found[f"grpo/clipped_{side}"])) for side in ("low", "high"))
    assert all(low[step] + high[step] == 0 for step in (1, 3, 5)) and low[2] + high[2] > 0 < low[4] + high[4]
    # log-probabilities have the temperature that tokens were drawn with; they are compared where the model is the same
    assert found["grpo/log_p_gap"][0] == found["grpo/same_experts"][0] == [1, 3, 5]
    assert 0 < max(found["grpo/log_p_gap"][1]) < max(found["grpo/log_p_gap_largest"][1]) < 1e-4
    assert min(found["grpo/same_experts"][1]) > 0.99


def test_grpo_finds_the_best_of_ten_classes_of_tokens(base):
    bandit = "{rewards: ['judges:last_digit'], group_size: 16, max_new_tokens: 1, replay_routes: true}"
    settings = [f"grpo={bandit}", "trainer.max_steps=30", "optimizer.lr=2e-2", "optimizer.warmup_steps=0",
                "trainer.val_check_interval=30", "data.batch_size=4"]  # fmt: skip
    assert tuned(base, "bandit", "grpo", *settings) == 0
    rewards = scalars(base, "bandit")["grpo/reward"][1]
    assert rewards[0] < 0.65 and rewards[-1] > 0.9


def test_a_judge_that_fails_stops_the_run_with_its_name_and_leaves_the_checkpoint(base, capsys):
    settings = ["grpo={rewards: ['judges:breaks'], group_size: 2, max_new_tokens: 4}", "trainer.max_steps=4",
                "callbacks.checkpoint.every_n_steps=1", "data.batch_size=4", "trainer.limit_val_batches=0"]  # fmt: skip
    assert tuned(base, "ill", "grpo", *settings) == 1
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert "step 3: grpo.rewards=judges:breaks: ValueError: the judge is ill; checkpoints are as they were" in last
    assert [path.name for path in sorted((base / "runs/ill/checkpoints").glob("step*"))] == [
        "step=1.ckpt",
        "step=2.ckpt",
    ]
    assert tuned(base, "ill", "grpo", *settings) == 0  # the same command goes on
    assert tuned(base, "well", "grpo", *settings) == 0
    assert_equal(weights(base, "well", 4), weights(base, "ill", 4))


def test_sampling_writes_right_answers_as_conversations_and_wrong_ones_as_pairs(base, capsys):
    flags = ["--samples", "4", "--max-new-tokens", "3", "--threshold", "0.5", "--reward", "judges:last_digit"]
    prompts = base / "asked.jsonl"
    asked = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": str(n)}] for n in range(6)]
    prompts.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in asked), encoding="utf-8")
    common = ["sample", str(base / "runs/start"), str(prompts)]
    assert main([*common, str(base / "pairs_made.jsonl"), *flags, "--pairs"]) == 0
    pairs = [json.loads(line) for line in (base / "pairs_made.jsonl").read_text(encoding="utf-8").splitlines()]
    assert 1 <= len(pairs) <= 6 and "answers right (" in capsys.readouterr().out
    for pair in pairs:
        assert pair["chosen"] + "?" == pair["messages"][-1]["content"] and not pair["rejected_ends"]
    assert main([*common, str(base / "none.jsonl"), *flags]) == 0  # no answer has ended
    assert (base / "none.jsonl").read_text() == ""
    # pairs of cut answers are learned without an end token
    assert run(base, "from_pairs", f"init_from={base / 'runs/start'}", f"data.paths=[{base / 'pairs_made.jsonl'}]",
               "dpo={beta: 0.1}", "trainer.max_steps=1", "data.batch_size=2", "trainer.limit_val_batches=0",
               "data.validation_fraction=0") == 0  # fmt: skip


def test_what_generating_from_sharded_weights_takes_is_said_before_the_first_step():
    words = ["callbacks.evaluate={tasks: [x.jsonl]}"]
    assert generation_notes(check(compose(["grpo"], words).tree)) == []
    first, second = generation_notes(check(compose(["grpo"], [*words, "strategy=fsdp2"]).tree))
    assert "gathers a whole fp32 copy of the model to sample from, 0.0407 GB" in first
    assert "callbacks.evaluate: a sharded model generates without a cache" in second


def test_rewards_that_are_all_0_are_explained_in_words(base, capsys):
    settings = ["grpo={rewards: ['judges:nothing'], group_size: 2, max_new_tokens: 2}", "trainer.max_steps=2",
                "data.batch_size=2", "trainer.limit_val_batches=0"]  # fmt: skip
    assert tuned(base, "nothing", "grpo", *settings) == 0
    said = capsys.readouterr().out
    assert said.count("have no contrast, so the gradient of the rewards is 0: every reward is 0;") == 1
    found = scalars(base, "nothing")
    assert found["grpo/without_contrast"][1] == [1, 1]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["grpo={rewards: ['nowhere:f'], max_new_tokens: 4}"], "grpo.rewards=nowhere:f: ModuleNotFoundError"),
        (["grpo={rewards: []}"], "grpo.rewards=[]: must name a function"),
        (["grpo={rewards: [judge]}"], "grpo.rewards=judge: must be module:function"),
        (["grpo={rewards: ['a:b'], group_size: 1}"], "grpo.group_size=1: must be at least 2"),
        (["grpo={rewards: ['a:b'], reference_steps: 3}"], "grpo.reference_steps=3: must be at least 1, with grpo.beta"),
        (["grpo={rewards: ['a:b'], max_new_tokens: 99}"], "grpo.max_new_tokens=99: with a prompt it needs"),
        (["grpo={rewards: ['a:b']}", "dpo={beta: 1}"], "dpo and grpo are both given"),
        (["dpo={beta: 0}"], "dpo.beta=0.0: must be above 0"),
        (["dpo={beta: 1}", "callbacks.weight_average={decay: 0.9}"], "callbacks.weight_average: is about text"),
        (["dpo={beta: 1}", "loss.balance=batch"], "loss.balance=batch: dpo has the balance losses of seq"),
        (
            ["dpo={beta: 1}", "strategy={kind: fsdp2, pipeline_parallel: 2}", "trainer.devices=2"],
            "dpo: layers in a pipe",
        ),
        (["dpo={beta: 1}", "init_from=null"], "dpo: needs a tokenizer; set init_from"),
        (["dpo={lora: 8}"], "dpo.lora: no such key"),
    ],
)
def test_settings_that_mean_nothing_are_refused_in_one_line(base, capsys, settings, why):
    kind = "grpo" if settings[0].startswith("grpo") else "dpo"
    assert tuned(base, "refused", kind, "trainer.max_steps=2", *settings) == 2
    assert why in capsys.readouterr().err


RANKS = ["trainer.devices=2", "strategy={kind: fsdp2_ep, expert_parallel: 2}"]
KEPT = ["trainer.max_steps=4", "callbacks.checkpoint={every_n_steps: 1, keep: 9}", "data.batch_size=4",
        "optimizer.lr=1e-3", "trainer.val_check_interval=4",
        "callbacks.killer={class_path: killer.Killer}"]  # fmt: skip
KILLS = "{rewards: ['judges:kills'], group_size: 4, max_new_tokens: 6, updates: 2, beta: 0.1}"


@pytest.fixture(scope="module")
def whole(base):
    """The run that others, which are broken off, end like."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(base)
        assert tuned(base, "whole", "grpo", f"grpo={KILLS}", *KEPT) == 0
    return weights(base, "whole", 4)


@pytest.mark.parametrize("place", ["judging", "sampling", "update"])
def test_a_run_that_is_killed_at_any_place_of_a_step_ends_with_the_same_bits(base, whole, place):
    code, output = ended(start(base, f"killed_{place}", "grpo", f"grpo={KILLS}", *KEPT, KILLED=place))
    assert code == -9, output
    assert not (base / f"runs/killed_{place}/checkpoints/step=4.ckpt").exists()
    assert (base / f"runs/killed_{place}/checkpoints/step={3 if place == 'update' else 2}.ckpt").exists()
    assert tuned(base, f"killed_{place}", "grpo", f"grpo={KILLS}", *KEPT) == 0
    assert_equal(whole, weights(base, f"killed_{place}", 4))


def test_two_ranks_with_experts_spread_over_them_take_the_same_steps(base, whole):
    code, output = ended(start(base, "ranks", "grpo", f"grpo={KILLS}", *KEPT, *RANKS))
    assert code == 0, output
    for step in (1, 2):
        assert_equal(weights(base, "whole", step), weights(base, "ranks", step), tolerance=3e-4)
    ours, theirs = scalars(base, "whole"), scalars(base, "ranks")
    assert ours["grpo/length"] == theirs["grpo/length"]
    assert ours["val/reward"][1] == pytest.approx(theirs["val/reward"][1], abs=1e-6)
