"""One unit for every interval, and one order of the samples."""

import json
from collections import Counter

import pytest

from tests.runs.compare import assert_same_curves

DIARY = "callbacks.diary={class_path: tests.runs.poison.Diary}"


def diary(run, rank=0):
    return [json.loads(line) for line in (run.folder / f"diary-{rank}.jsonl").read_text().splitlines()]


def test_intervals_count_optimizer_steps_also_under_accumulation_and_in_later_epochs(nano):
    """seen elsewhere: validation counts micro-batches and drifts (Lightning-AI/pytorch-lightning#12205)."""
    run = nano.run(
        "intervals",
        DIARY,
        "trainer.max_steps=60",
        "trainer.accumulate_grad_batches=4",
        "trainer.val_check_interval=8",
        "data.batch_size=4",
        "data.sequence_length=256",
        "callbacks.checkpoint.every_n_steps=12",
        "callbacks.checkpoint.keep=9",
        "callbacks.sample_text={every_n_steps: 5, prompts: [a], max_new_tokens: 1, temperature: 0.0}",
        "trainer.limit_val_batches=1",
    )
    assert run.code == 0
    entries = diary(run)
    samples = sum(len(entry["samples"]) for entry in entries if "samples" in entry)
    ids = Counter(sample for entry in entries for sample in entry.get("samples", []))
    assert samples == 60 * 4
    assert set(run.scalars()["val/loss"][0]) == {8, 16, 24, 32, 40, 48, 56, 60}
    train = run.scalars()["loss/main"][0]
    assert train == list(range(1, 61))
    for tag in ("optimizer/lr", "balance/bias_absmax", "balance/max_vio", "mtp/weight"):
        assert run.scalars()[tag][0] == train, tag
    saved = sorted(int(path.stem.split("=")[1]) for path in (run.folder / "checkpoints").glob("step=*.ckpt"))
    assert saved == [12, 24, 36, 48, 60]
    assert max(ids.values()) <= 1 + samples // len(ids)


def test_a_growing_batch_is_the_same_numbers_in_any_micro_batches_also_when_the_run_goes_on(nano):
    """Steps of 2 to 8 samples in 1 to 4 micro-batches, which Lightning counts to find steps and validations."""
    words = (
        "data.batch_ramp={start: 2, increment: 2, tokens: 1536}", DIARY, "trainer.max_steps=10",
        "trainer.val_check_interval=3", "trainer.limit_val_batches=1",
        "callbacks.checkpoint={every_n_steps: 1, keep: 9}",
        "loss={balance: [sequence, batch], balance_factor: [0.01, 0.01]}", "optimizer.eps=1e-3",
    )  # fmt: skip
    one = nano.run("one", *words)
    parts = nano.run("parts", *words, "trainer.accumulate_grad_batches=4")
    samples = [[entry["samples"] for entry in diary(run) if "samples" in entry] for run in (one, parts)]
    assert [len(of_step) for of_step in samples[0]] == [2, 2, 2, 2, 4, 4, 6, 6, 8, 8]
    assert samples[1] == samples[0]
    assert parts.scalars()["val/loss"][0] == [3, 6, 9, 10]
    assert_same_curves(one, parts, 1e-5)
    for micro_batches, step in ((2, 3), (4, 6)):  # 3: of a step of 2 samples, and before a validation
        on = nano.run(
            f"on_{step}", *words, f"trainer.accumulate_grad_batches={micro_batches}",
            f"run.resume={parts.folder / f'checkpoints/step={step}.ckpt'}",
        )  # fmt: skip
        assert on.code == 0
        assert_same_curves(one, on, 1e-5, after=step)


def test_validation_moves_no_bias_and_the_mtp_router_is_balanced_too(nano):
    run = nano.run(
        "bias",
        DIARY,
        "trainer.val_check_interval=5",
        "callbacks.expert_bias={speed: 0.25, schedule: [[0.0, 1.0], [0.9, 0.0]]}",
        "callbacks.checkpoint.every_n_steps=1",
        "callbacks.checkpoint.keep=99",
    )
    for entry in diary(run):
        if entry.get("validation"):
            saved = run.weights(entry["step"])
            biases = [value for name, value in saved.items() if name.endswith("expert_bias")]
            assert entry["biases"] == [bias.double().sum().item() for bias in biases]  # as after the last train step
    for step in range(2, 21):
        before, after = run.weights(step - 1), run.weights(step)
        names = [name for name in after if name.endswith("expert_bias")]
        assert any(name.startswith("model.mtp.") for name in names)
        for name in names:
            moves = (after[name] - before[name]).abs()
            assert set(moves.tolist()) <= {0.0, 0.25}, f"{name} moved more than once in step {step}"
            assert bool(moves.any()) == (step <= 18), f"{name} in step {step}"


@pytest.mark.parametrize("devices", [1, 2])
def test_a_rank_without_validation_samples_waits_for_none(nano, devices, tmp_path):
    """seen elsewhere: the other ranks hang in a collective (Lightning-AI/litgpt#2319)."""
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(f"def number():\n    return {number}\n" * (40 if number else 3))
    data = (
        f"data.paths=[{tmp_path / '0.txt'},{tmp_path / '1.txt'}]",
        "data.validation_fraction=0.5",
        "model.vocab_size=300",
    )
    run = nano.command(f"few{devices}", f"trainer.devices={devices}", "trainer.max_steps=4", *data, timeout=120)
    assert run.code == 0, run.output
    if devices == 2:
        one = nano.run("few1", "trainer.max_steps=4", *data)
        assert run.report()["val_loss"] == pytest.approx(one.report()["val_loss"], rel=1e-5)
        assert run.report()["max_vio_global"] == one.report()["max_vio_global"]


def test_no_validation_documents_is_said_and_trained_without(nano):
    run = nano.command("none", "data.validation_fraction=0", "trainer.max_steps=4")
    assert run.code == 0, run.output
    assert "validation is off" in run.output and "Warning" not in run.output, run.output
    assert run.report()["val_loss"] is None and run.report()["train_loss"] > 0


def test_models_without_mtp_without_experts_and_with_one_layer_of_them_train_and_validate(nano):
    """A metric of one element comes back from torchmetrics as a scalar."""
    ends = ("trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.limit_val_batches=1")
    one = nano.run("one", *ends, "model.first_k_dense_replace=2", "model.num_nextn_predict_layers=0")
    assert one.code == 0 and len(one.report()["max_vio_global"]) == 1 and one.report()["mtp_loss"] == []
    dense = (
        "model.first_k_dense_replace=3", "model.num_nextn_predict_layers=0", "loss.balance=none",
        "callbacks.expert_bias=null", "callbacks.router_monitor=null", "callbacks.router_probe=null",
    )  # fmt: skip
    gqa = ("model.attention=gqa", "model.kv_lora_rank=0", "model.q_lora_rank=null", "model.num_key_value_heads=2")
    two = nano.run("two", *ends, *dense, *gqa)
    assert two.code == 0 and two.report()["max_vio_global"] is None and two.report()["val_loss"] > 0
