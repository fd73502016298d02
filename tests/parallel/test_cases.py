"""What went wrong elsewhere, on two ranks under sharding, and with FOUR_RANKS=1 pytest on four, too.

Each test names where it was seen.
"""

import math
import os

import pytest
import torch

from dsv3_lightning.cli import main
from dsv3_lightning.parallel.checkpoints.one_file import read_checkpoint
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
RANKS = (2, 4) if "FOUR_RANKS" in os.environ else (2,)  # which take as long again
MOVED = (*ORDER[:-1], "callbacks.checkpoint.every_n_steps=100", DIARY,
         "callbacks.stop={class_path: tests.runs.poison.Stop, init_args: {steps: [3, 5]}}")  # fmt: skip
FOUR_PARTS = ("data.batch_size=16", "trainer.accumulate_grad_batches=4", "trainer.log_every_n_steps=5")
EP = "strategy={kind: fsdp2_ep, sharded_checkpoints: true}"
EP2 = "strategy={kind: fsdp2_ep, expert_parallel: 2}"
LONG = (EP, "trainer.max_steps=60", "data.batch_size=4", "data.sequence_length=16", "trainer.log_every_n_steps=5",
        "trainer.val_check_interval=20",
        "callbacks.diary={class_path: tests.runs.poison.Diary, init_args: {memory_every: 30}}")  # fmt: skip

pytestmark = pytest.mark.timeout(900)  # many runs, made before the first test


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
        **{f"moved_{n}": (*MOVED, few, "trainer.accumulate_grad_batches=4") for n in RANKS},
    }
    for name, overrides in one.items():
        assert shared_nano.run(name, *SMALL, *overrides).code == 0
    found = list(one)
    for n in RANKS:
        ways = {
            f"tied_{n}": (*TIED, "strategy={kind: fsdp2, sharded_checkpoints: true}"),
            f"tied_resumed_{n}": (*TIED, "strategy=fsdp2", resumed(f"tied_{n}", 6)),
            f"order_{n}": (*ORDER, few, DIARY, "strategy=fsdp2"),
            f"order_from_3_{n}": (*ORDER, few, DIARY, EP, "data.num_workers=3", resumed(f"order_{n}", 3)),
            f"order_from_4_{n}": (*ORDER, few, DIARY, "strategy=ddp", "data.num_workers=2", resumed(f"order_{n}", 4)),
            f"moved_{n}": (*MOVED, few, "strategy=fsdp2", f"trainer.accumulate_grad_batches={4 // n}"),
            f"moved_on_{n}": (*MOVED, few, EP, f"trainer.accumulate_grad_batches={4 // n}", f"run.name=moved_{n}"),
            f"mixed_{n}": (*MIXED, EP),
            f"depth1_{n}": (*FOUR, "strategy=fsdp2", recorded(f"depth1_{n}")),
            f"depth2_{n}": (*FOUR, EP2, "model.num_nextn_predict_layers=2", recorded(f"depth2_{n}")),
            **{f"few_{kind}_{n}": (*FEW, few, "trainer.max_steps=2", f"strategy={kind}") for kind in ("ddp", "fsdp2")},
            f"few_ep_{n}": (*FEW, few, "trainer.max_steps=2", EP2),
            f"none_ep_{n}": ("trainer.max_steps=2", "data.validation_fraction=0", EP2),
            f"once_{n}": (EP, *FOUR_PARTS, POISON.format(rank=n - 1, step=7, onwards="false")),
            **({"long": LONG} if n == 2 else {}),
            f"endless_{n}": (EP, "callbacks.checkpoint.every_n_steps=2", "optimizer.max_skipped_steps=3",
                             POISON.format(rank=n - 1, step=7, onwards="true")),
        }  # fmt: skip
        output = runs_on_ranks(n, shared_nano, {name: (*SMALL, f"trainer.devices={n}", *ways[name]) for name in ways})
        (base / f"output_{n}").write_text(output[0])
        found += ways
    return {name: Run(base / "runs" / name, 0) for name in found}


def weights(run, step):
    return read_checkpoint(run.folder / f"checkpoints/step={step}.ckpt")["state_dict"]


@pytest.mark.parametrize("n", RANKS)
def test_tied_embeddings_stay_one_parameter(runs, shared_nano, capsys, n):
    """Saved as two, they drift apart and the loss jumps on resume (NVIDIA-NeMo/Automodel#2571)."""
    run = runs[f"tied_{n}"]
    whole, resumed = weights(run, 12), weights(runs[f"tied_resumed_{n}"], 12)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert torch.equal(whole["model.embed_tokens.weight"], whole["model.lm_head.weight"])
    assert_same_curves(runs["tied_1"], run, 2e-5)
    state = read_checkpoint(run.folder / "checkpoints/step=12.ckpt")["optimizer_states"][0]["state"]
    kept = sum(v.numel() for values in state.values() for what, v in values.items() if what == "exp_avg")
    assert kept == run.report()["parameters"] < sum(value.numel() for value in whole.values())
    out = shared_nano.base / f"exported_{n}"
    assert main(["export", str(run.folder), str(out), "--verify"]) == 0, capsys.readouterr()


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("depth", [1, 2])
def test_means_are_over_the_valid_targets_of_all_ranks(runs, shared_nano, depth, n):
    """60, 12, 4 and none, a sample of each; elsewhere each rank divides by its own (NVIDIA/Megatron-LM#7452)."""
    folder = shared_nano.base / "recorded"
    for step in (1, 2, 3):
        one, many = (torch.load(folder / f"depth{depth}_{ranks}/step={step}.pt") for ranks in (1, n))
        for name, value in one.items():
            assert (value - many[name]).norm() <= 2e-6 * step * value.norm(), (step, name)
    assert_same_curves(runs[f"depth{depth}_1"], runs[f"depth{depth}_{n}"], 1e-5)


@pytest.mark.parametrize("n", RANKS)
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all_and_counted_once(runs, n):
    """pytorch/torchtitan#4226: seen on one rank only, and only where it is logged."""
    run = runs[f"once_{n}"]
    assert run.report()["skipped_steps"] == 1 and math.isfinite(run.report()["val_loss"])
    state = read_checkpoint(run.folder / "checkpoints/step=12.ckpt")
    steps = {float(values["step"]) for values in state["optimizer_states"][0]["state"].values()}
    assert steps == {11.0} and all(bool(torch.isfinite(value).all()) for value in state["state_dict"].values())


@pytest.mark.parametrize("n", RANKS)
def test_steps_without_end_that_are_not_finite_stop_the_run_and_leave_a_good_checkpoint(runs, shared_nano, capsys, n):
    output = (shared_nano.base / f"output_{n}").read_text()
    assert output.count("not finite 3 steps in a row") == 1 and "Traceback" not in output
    newest = runs[f"endless_{n}"].folder / "checkpoints/last.ckpt"
    assert newest.resolve().name in ("step=6.ckpt", "step=8.ckpt")
    assert main(["checkpoint", "verify", str(newest)]) == 0
    assert "all finite" in capsys.readouterr().out


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "ep"])
def test_ranks_without_validation_samples_wait_for_none(runs, kind, n):
    """One sample for all ranks; the others hang elsewhere (Lightning-AI/litgpt#2319)."""
    one, many = runs["few_1"].report(), runs[f"few_{kind}_{n}"].report()
    assert many["val_loss"] == pytest.approx(one["val_loss"], rel=1e-4)
    assert many["max_vio_global"] == one["max_vio_global"]


@pytest.mark.parametrize("n", RANKS)
def test_without_validation_samples_it_says_so(runs, shared_nano, n):
    assert runs[f"none_ep_{n}"].report()["val_loss"] is None
    assert (shared_nano.base / f"output_{n}").read_text().count("validation is off") == 1


@pytest.mark.parametrize("n", RANKS)
def test_the_order_of_samples_is_one_for_any_ranks_workers_and_resumes(runs, n):
    """Three epochs and more; a resume in the middle of one, and one at its end (PrimeIntellect-ai/prime-rl#3301)."""

    def order(name, ranks):
        return order_of_samples(runs[f"{name}_{ranks}"], ranks)

    one = order("order", 1)
    assert len(one) == 7 and order("order", n) == one
    assert order("order_from_3", n) == {step: one[step] for step in range(4, 8)}
    assert order("order_from_4", n) == {step: one[step] for step in range(5, 8)}
    drawn = sum(one.values(), [])
    size = len(set(drawn))
    epochs = [drawn[start : start + size] for start in range(0, len(drawn) - size + 1, size)]
    assert len(epochs) >= 3 and all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def order_of_samples(run, ranks):
    """{step: those of each rank, one rank after the other}, of all sessions of a run."""
    steps = {}
    for entry in (entry for rank in range(ranks) for entry in diary(run, rank) if "samples" in entry):
        steps.setdefault(entry["step"], []).extend(entry["samples"])
    return steps


@pytest.mark.parametrize("n", RANKS)
def test_a_stop_that_one_rank_asks_for_stops_all_and_any_ranks_and_micro_batches_resume(runs, shared_nano, n):
    """After step 3 on one process, of four micro-batches; after step 5 on several, of fewer."""
    output = (shared_nano.base / f"output_{n}").read_text()
    assert output.count("stopped by a callback that set trainer.should_stop after step 5, which is saved") == 1
    assert all(f"continuing after step {step} from" in output for step in (3, 5))
    one, moved = order_of_samples(runs["order_1"], 1), order_of_samples(runs[f"moved_{n}"], n)
    assert {step: sorted(samples) for step, samples in moved.items()} == {
        step: sorted(samples) for step, samples in one.items()
    }


@pytest.mark.parametrize("n", RANKS)
def test_bf16_products_of_parts_learn_as_those_of_the_whole(runs, n):
    one, many = (runs[f"mixed_{ranks}"].scalars()["loss/main"] for ranks in (1, n))
    assert one[0] == many[0] and many[1] == pytest.approx(one[1], rel=2e-3)
    assert {value.dtype for value in weights(runs[f"mixed_{n}"], 12).values()} == {torch.float32}


def test_memory_does_not_grow(runs):
    """Lightning-AI/pytorch-lightning#4556: logged tensors keep their graphs. `benchmarks/soak.py` takes 2,000 steps."""
    for rank in (0, 1):
        used = {entry["step"]: entry["rss"] for entry in diary(runs["long"], rank) if "rss" in entry}
        assert used[60] < 1.02 * used[30], used
