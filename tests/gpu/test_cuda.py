"""Runs on a CUDA GPU. Without one these tests are skipped; `make gpu-check` says so."""

import warnings

import pytest
import torch

from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check
from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.parallel.mesh import MeshShape, StrategyConfig
from dsv3_lightning.training.dry_run import dry_run
from dsv3_lightning.training.optimizer import build_optimizer
from tests.gpu.test_kernels import SLICE
from tests.runs.compare import assert_same_curves

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
GPU = torch.device("cuda")


def test_a_resumed_run_follows_the_uninterrupted_one(nano):
    common = ("trainer.accelerator=gpu", "trainer.precision=bf16-mixed", "callbacks.sample_text=null")
    saved = ("callbacks.checkpoint={every_n_steps: 3, keep: 3, keep_best: 0}",)
    whole = nano.run("whole", *common, *saved, "trainer.max_steps=6")
    checkpoint = whole.folder / "checkpoints/step=3.ckpt"
    again = nano.run("again", *common, *saved, "trainer.max_steps=6", f"run.resume={checkpoint}")
    assert whole.code == again.code == 0
    assert_same_curves(whole, again, 1e-3, after=3)  # kernels may add up in another order


def test_the_host_waits_once_per_moe_layer():
    """By `torch.cuda.set_sync_debug_mode`, over one forward and backward pass after a first one."""
    with GPU:
        model = Transformer(SLICE)
    model.init_weights(1)
    tokens = torch.randint(1024, (2, 130), device=GPU)
    targets = torch.stack([tokens[:, 1 + k : 129 + k] for k in range(2)], 1)
    mask = torch.ones_like(tokens, dtype=torch.bool)

    def passes() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            losses = model.losses(tokens, mask, targets)
        losses.nll_P.sum().backward()

    passes()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        passes()
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in found if "synchron" in str(warning.message)]
    moe_layers = 2
    assert len(waits) <= moe_layers, f"{len(waits)} waits: {waits}"


def test_peak_memory_is_that_of_the_dry_run():
    config = check(compose(["v2-lite"], ["model.num_hidden_layers=3"]).tree)
    T, samples = 2048, 2
    with GPU:
        model = Transformer(config.model, "selective")
    model.init_weights(1)
    optimizer = build_optimizer(model, config.optimizer)
    tokens = torch.randint(config.model.vocab_size, (samples, T + 1), device=GPU)
    for number in range(2):
        if number == 1:  # the first makes the moments
            torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            losses = model.losses(tokens, torch.ones_like(tokens, dtype=torch.bool), tokens[:, None, 1:])
        (losses.nll_P.sum() + sum(term.sum() for term in losses.balance.values())).backward()
        optimizer.step()
    counted = dry_run(config.model, config.optimizer, StrategyConfig(kind="fsdp2"), MeshShape(1, 1), samples, T,
                      "bf16-mixed", "selective")  # fmt: skip
    assert torch.cuda.max_memory_allocated() == pytest.approx(counted.peak, rel=0.15)


def test_one_rank_of_fsdp2_ep_trains_over_nccl(nano, tmp_path):
    run = nano.run("one_rank", "strategy=fsdp2_ep", "trainer.accelerator=gpu", "trainer.devices=1",
                   "trainer.precision=bf16-mixed", "trainer.max_steps=4", "callbacks.sample_text=null")  # fmt: skip
    assert run.code == 0
