"""Under `precision: bf16` the gradients of a step's micro-batches and ranks are added up in fp32 (V3 §3.3.2)."""

import pytest
import torch

from tests.parallel.conftest import runs_on_ranks

PARTS = 16  # a power of two: each gradient is then the same bits as in a step of its own, but for the exponent
COMMON = (
    "trainer.precision=bf16",
    "trainer.val_check_interval=16",
    "trainer.limit_val_batches=1",
    "model.num_hidden_layers=2",
    "loss.balance=none",
    "callbacks.expert_bias.speed=0",
    "callbacks.mtp_weight.schedule=[[0.0, 0.3]]",
    "callbacks.sample_text=null",
    "optimizer.lr=1e-30",  # all steps with the same weights
)
WAYS = {
    "auto": (1, ()),
    "ddp": (2, ("strategy=ddp",)),
    "fsdp2_ep": (2, ("strategy=fsdp2_ep",)),
    "tied": (2, ("strategy=fsdp2", "model.tie_word_embeddings=true")),
    "zbv": (2, ("model.num_hidden_layers=3",)),  # whose micro-batches are a pipeline's
}


@pytest.fixture(scope="module")
def gradients(shared_nano):
    """By strategy: those of one step of many micro-batches, and of as many steps of one."""
    folder = shared_nano.base / "recorded"

    def overrides(way: str, micro_batches: int) -> tuple[str, ...]:
        (ranks, words), recorded = WAYS[way], folder / f"{way}-{micro_batches}"
        samples, parts = micro_batches * ranks, f"trainer.accumulate_grad_batches={micro_batches}"
        if way == "zbv":
            samples = micro_batches
            parts = f"strategy={{kind: fsdp2, pipeline_parallel: 2, micro_batches: {micro_batches}}}"
        return (
            *COMMON, *words, f"trainer.devices={ranks}", f"trainer.max_steps={PARTS // micro_batches}",
            parts, f"data.batch_size={samples}",
            f"callbacks.even={{class_path: tests.parallel.recorder.Even, init_args: {{count: {64 * samples}}}}}",
            f"callbacks.recorder={{class_path: tests.parallel.recorder.Recorder, init_args: {{folder: {recorded}}}}}",
        )  # fmt: skip

    runs = {f"{way}-{parts}": overrides(way, parts) for way in WAYS for parts in (PARTS, 1)}
    for name in (f"auto-{PARTS}", "auto-1"):
        assert shared_nano.run(name, *runs.pop(name)).code == 0
    runs_on_ranks(2, shared_nano, runs)
    return {
        way: (torch.load(folder / f"{way}-{PARTS}/step=1.pt"),
              [torch.load(folder / f"{way}-1/step={step}.pt") for step in range(1, PARTS + 1)])
        for way in WAYS
    }  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_many_micro_batches_are_added_up_exactly(gradients, way):
    """In bf16 a gradient is off by 5e-3 of its norm after as many."""
    sums, parts = gradients[way]
    for name, found in sums.items():
        exact = sum(part[name].double() for part in parts) / PARTS
        error = float((found.double() - exact).norm() / exact.norm())
        assert error < 1e-6, f"{name}: off by {error:.1e} of its norm"
        assert found.dtype == torch.float32, name


def test_ranks_are_added_up_exactly(gradients):
    """The same samples, in other micro-batches: what is rounded in bf16 is a micro-batch's own."""
    one, two = (gradients[way][1] for way in ("auto", "ddp"))
    for step in range(PARTS // 2):
        for name, found in two[step].items():
            exact = (one[2 * step][name].double() + one[2 * step + 1][name].double()) / 2
            assert (found.double() - exact).norm() < 1e-6 * exact.norm(), (step, name)
