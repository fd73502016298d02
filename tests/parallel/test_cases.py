"""What went wrong elsewhere, on two and four ranks under sharding: each test names where it was seen."""

import math

import pytest
import torch

from dsv3_lightning.cli import main
from dsv3_lightning.training.checkpoint_io import read_checkpoint
from tests.conftest import Run
from tests.parallel.conftest import runs_on_ranks
from tests.runs.compare import assert_same_curves
from tests.runs.test_non_finite import POISON
from tests.runs.test_steps import DIARY, diary

SMALL = (
    "trainer.max_steps=12",
    "trainer.val_check_interval=6",
    "trainer.limit_val_batches=1",
    "data.sequence_length=24",
    "model.num_hidden_layers=2",
    "callbacks.checkpoint.every_n_steps=6",
    "callbacks.sample_text=null",
    "optimizer.eps=1e-3",
)
TIED = ("model.tie_word_embeddings=true",)
FEW = ("model.vocab_size=300", "data.validation_fraction=0.5", "data.batch_size=4", "trainer.limit_val_batches=1.0")
ORDER = (*FEW, "data.sequence_length=64", "trainer.max_steps=7", "callbacks.checkpoint={every_n_steps: 1, keep: 9}")
COUNTS = "callbacks.valid={class_path: tests.parallel.recorder.Valid, init_args: {counts: [60, 12, 4, 0]}}"
FOUR = ("trainer.max_steps=3", "data.sequence_length=64", "data.batch_size=4", "trainer.val_check_interval=3", COUNTS)
MIXED = ("trainer.precision=bf16-mixed",)
EP = "strategy={kind: fsdp2_ep, sharded_checkpoints: true}"
EP2 = "strategy={kind: fsdp2_ep, expert_parallel: 2}"


@pytest.fixture(scope="module")
def few(shared_nano):
    """Two documents: one of them, of a single sample, is for validation."""
    for number, lines in enumerate((3, 60)):
        (shared_nano.base / f"{number}.txt").write_text(f"def number():\n    return {number}\n" * lines)
    return f"data.paths=[{shared_nano.base / '0.txt'},{shared_nano.base / '1.txt'}]"


@pytest.fixture(scope="module")
def runs(shared_nano, few):
    base = shared_nano.base

    def recorded(name):
        folder = base / "recorded" / name
        return f"callbacks.recorder={{class_path: tests.parallel.recorder.Recorder, init_args: {{folder: {folder}}}}}"

    def resumed(name, step):
        return f"run.resume={base / 'runs' / name / f'checkpoints/step={step}.ckpt'}"

    one = {
        "tied_1": TIED,
        "order_1": (*ORDER, few, DIARY, "data.num_workers=2"),
        "mixed_1": MIXED,
        "depth1_1": (*FOUR, recorded("depth1_1")),
        "depth2_1": (*FOUR, "model.num_nextn_predict_layers=2", recorded("depth2_1")),
        "few_1": (*FEW, few, "trainer.max_steps=2"),
    }
    two = {
        "tied": (*TIED, "strategy={kind: fsdp2, sharded_checkpoints: true}"),
        "tied_resumed": (*TIED, "strategy=fsdp2", resumed("tied", 6)),
        "order": (*ORDER, few, DIARY, "strategy=fsdp2"),
        "order_from_3": (*ORDER, few, DIARY, EP, "data.num_workers=3", resumed("order", 3)),
        "order_from_4": (*ORDER, few, DIARY, "strategy=ddp", "data.num_workers=2", resumed("order", 4)),
        "mixed": (*MIXED, EP),
        "once": (EP, "trainer.accumulate_grad_batches=4", "trainer.log_every_n_steps=5",
                 POISON.format(rank=1, step=7, onwards="false")),
        "long": (EP, "trainer.max_steps=120", "data.batch_size=2", "data.sequence_length=16",
                 "trainer.log_every_n_steps=5", "trainer.val_check_interval=20",
                 "callbacks.diary={class_path: tests.runs.poison.Diary, init_args: {memory_every: 60}}"),
        "endless": (EP, "callbacks.checkpoint.every_n_steps=2", "optimizer.max_skipped_steps=3",
                    POISON.format(rank=1, step=7, onwards="true")),
    }  # fmt: skip
    four = {
        "depth1": (*FOUR, "strategy=fsdp2", recorded("depth1")),
        "depth2": (*FOUR, EP2, "model.num_nextn_predict_layers=2", recorded("depth2")),
        **{f"few_{kind}": (*FEW, few, "trainer.max_steps=2", f"strategy={kind}") for kind in ("ddp", "fsdp2")},
        "few_ep": (*FEW, few, "trainer.max_steps=2", EP2),
        "none_ep": ("trainer.max_steps=2", "data.validation_fraction=0", EP2),
    }
    for name, overrides in one.items():
        assert shared_nano.run(name, *SMALL, *overrides).code == 0
    for ranks, ways in ((2, two), (4, four)):
        spread = {name: (*SMALL, f"trainer.devices={ranks}", *way) for name, way in ways.items()}
        output = runs_on_ranks(ranks, shared_nano, spread)[0]
        (base / f"output{ranks}").write_text(output)
    return {name: Run(base / "runs" / name, 0) for name in one | two | four}


def weights(run, step):
    return read_checkpoint(run.folder / f"checkpoints/step={step}.ckpt")["state_dict"]


def test_tied_embeddings_stay_one_parameter(runs, shared_nano, capsys):
    """Saved as two, they drift apart and the loss jumps on resume (NVIDIA-NeMo/Automodel#2571)."""
    whole, resumed = weights(runs["tied"], 12), weights(runs["tied_resumed"], 12)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert torch.equal(whole["model.embed_tokens.weight"], whole["model.lm_head.weight"])
    assert_same_curves(runs["tied_1"], runs["tied"], 2e-5)
    state = read_checkpoint(runs["tied"].folder / "checkpoints/step=12.ckpt")["optimizer_states"][0]["state"]
    kept = sum(v.numel() for values in state.values() for what, v in values.items() if what == "exp_avg")
    assert kept == runs["tied"].report()["parameters"] < sum(value.numel() for value in whole.values())
    out = shared_nano.base / "exported"
    assert main(["export", str(runs["tied"].folder), str(out), "--verify"]) == 0, capsys.readouterr()


@pytest.mark.parametrize("depth", [1, 2])
def test_means_are_over_the_valid_targets_of_all_ranks(runs, shared_nano, depth):
    """60, 12, 4 and none on four ranks; elsewhere each rank divides by its own (NVIDIA/Megatron-LM#7452)."""
    folder = shared_nano.base / "recorded"
    for step in (1, 2, 3):
        one, four = (torch.load(folder / f"depth{depth}{end}/step={step}.pt") for end in ("_1", ""))
        for name, value in one.items():
            assert (value - four[name]).norm() <= 2e-6 * step * value.norm(), (step, name)
    assert_same_curves(runs[f"depth{depth}_1"], runs[f"depth{depth}"], 1e-5)


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_both_and_counted_once(runs):
    """pytorch/torchtitan#4226: seen on one rank only, and only where it is logged."""
    assert runs["once"].report()["skipped_steps"] == 1 and math.isfinite(runs["once"].report()["val_loss"])
    state = read_checkpoint(runs["once"].folder / "checkpoints/step=12.ckpt")
    steps = {float(values["step"]) for values in state["optimizer_states"][0]["state"].values()}
    assert steps == {11.0} and all(bool(torch.isfinite(value).all()) for value in state["state_dict"].values())


def test_steps_without_end_that_are_not_finite_stop_the_run_and_leave_a_good_checkpoint(runs, shared_nano, capsys):
    output = (shared_nano.base / "output2").read_text()
    assert output.count("not finite 3 steps in a row") == 1 and "Traceback" not in output
    newest = runs["endless"].folder / "checkpoints/last.ckpt"
    assert newest.resolve().name in ("step=6.ckpt", "step=8.ckpt")
    assert main(["checkpoint", "verify", str(newest)]) == 0
    assert "all finite" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "ep"])
def test_ranks_without_validation_samples_wait_for_none(runs, kind):
    """One sample for four ranks; the others hang elsewhere (Lightning-AI/litgpt#2319)."""
    one, four = runs["few_1"].report(), runs[f"few_{kind}"].report()
    assert four["val_loss"] == pytest.approx(one["val_loss"], rel=1e-4)
    assert four["max_vio_global"] == one["max_vio_global"]


def test_without_validation_samples_it_says_so(runs, shared_nano):
    assert runs["none_ep"].report()["val_loss"] is None
    assert (shared_nano.base / "output4").read_text().count("validation is off") == 1


def test_the_order_of_samples_is_one_for_any_ranks_workers_and_resumes(runs):
    """Three epochs and more; a resume in the middle of one, and one at its end (PrimeIntellect-ai/prime-rl#3301)."""

    def order(name, ranks):
        steps = [[entry for entry in diary(runs[name], rank) if "samples" in entry] for rank in range(ranks)]
        return {entries[0]["step"]: sum((entry["samples"] for entry in entries), []) for entries in zip(*steps)}

    one = order("order_1", 1)
    assert len(one) == 7 and order("order", 2) == one
    assert order("order_from_3", 2) == {step: one[step] for step in range(4, 8)}
    assert order("order_from_4", 2) == {step: one[step] for step in range(5, 8)}
    drawn = sum(one.values(), [])
    size = len(set(drawn))
    epochs = [drawn[start : start + size] for start in range(0, len(drawn) - size + 1, size)]
    assert len(epochs) >= 3 and all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_bf16_products_of_parts_learn_as_those_of_the_whole(runs):
    one, two = (runs[name].scalars()["loss/main"] for name in ("mixed_1", "mixed"))
    assert one[0] == two[0] and two[1] == pytest.approx(one[1], rel=2e-3)
    assert {value.dtype for value in weights(runs["mixed"], 12).values()} == {torch.float32}


def test_memory_does_not_grow(runs):
    """Lightning-AI/pytorch-lightning#4556: logged tensors keep their graphs."""
    for rank in (0, 1):
        used = {entry["step"]: entry["rss"] for entry in diary(runs["long"], rank) if "rss" in entry}
        assert used[120] < 1.02 * used[60], used
