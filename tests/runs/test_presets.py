"""Every preset trains two steps: small ones as they are, large ones shrunken; of these the full shapes are run too.

A new file in `configs/` is found and tried without a change here.
"""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dsv3_lightning.cli import main
from dsv3_lightning.config.compose import compose, presets
from dsv3_lightning.config.schema import check
from dsv3_lightning.model.losses import IGNORE
from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.planning.parameters import count_parameters
from dsv3_lightning.training.dry_run import compute_as_on_a_gpu
from tests.conftest import ROOT, Run

OTHERS = {
    "base",
    "cleaning",
    "dpo",
    "extend",
    "grpo",
    "instruct",
}  # the first two aren't runs; the others start from one: tests/hub
TRAINED = sorted(set(presets()) - OTHERS)
MODELS = {name: check(compose([name]).tree).model for name in TRAINED}
LARGE = [name for name, model in MODELS.items() if count_parameters(model).total > 100_000_000]

# Sizes alone: whatever names a way of routing, a schedule, a loss or a precision stays the preset's own.
SMALL = (
    "model.vocab_size=512",
    "model.hidden_size=32",
    "model.num_hidden_layers=4",
    "model.num_attention_heads=2",
    "model.intermediate_size=48",
    "model.kv_lora_rank=16",
    "model.qk_nope_head_dim=16",
    "model.qk_rope_head_dim=8",
    "model.v_head_dim=16",
    "model.moe_intermediate_size=16",
    "data.sequence_length=32",
    "data.batch_size=4",
    "trainer.accumulate_grad_batches=2",
)
ROUTING = {  # of the papers: affinities, groups, MTP modules; a dense model has no router
    "v2-lite": ("softmax", 1, 0),
    "moonlight": ("sigmoid", 1, 0),
    "v3": ("sigmoid", 8, 1),
}


def shrunken(name: str) -> list[str]:
    model = MODELS[name]
    if model.num_moe_layers == 0:  # with grouped queries, if the preset has them, at two heads
        heads = f"model.num_key_value_heads={2 if model.num_key_value_heads == model.num_attention_heads else 1}"
        return [*SMALL, "model.kv_lora_rank=0", "model.moe_intermediate_size=0", "model.first_k_dense_replace=4", heads]
    ramp = "data.batch_ramp={start: 2, increment: 2, tokens: 64}"
    return [*SMALL, "model.q_lora_rank=16", ramp] if name == "v3" else [*SMALL]


def corpus(name: str, data_cache: list[str]) -> list[str]:
    """Settings of a small corpus: for bilingual, whose own is fetched, other texts of its three sources, uncleaned."""
    if name != "bilingual":
        return data_cache
    paths, *rest = data_cache
    sources = {"english": f"[{ROOT / 'docs'}]", "chinese": f"[{ROOT / 'tests/model'}]", "code": paths.split("=")[1]}
    return [*rest, "data.cleaning=null", *(f"data.sources.{name}.paths={given}" for name, given in sources.items())]


def two_steps(base, data_cache, name, *overrides) -> Run:
    words = ["trainer.max_steps=2", "trainer.log_every_n_steps=1", "trainer.limit_val_batches=2"]
    code = main(
        [
            "run",
            name,
            f"run.dir={base}",
            *corpus(name, data_cache),
            "callbacks.throughput.peak_flops=1e11",
            *words,
            *overrides,
        ]
    )
    return Run(base / name, code)


def assert_trained(run: Run) -> None:
    assert run.code == 0
    report, losses = run.report(), run.scalars()["loss/main"]
    assert report["steps"] == 2 and losses[0] == [1, 2]
    assert all(math.isfinite(value) for value in (*losses[1], report["val_loss"], *(report["max_vio_global"] or [])))


def test_presets_have_the_routing_of_their_papers():
    assert {
        name: (MODELS[name].scoring_func, MODELS[name].n_group, MODELS[name].mtp_depth) for name in ROUTING
    } == ROUTING
    assert all(MODELS[name].attention == "gqa" and MODELS[name].num_moe_layers == 0 for name in ("llm-7b", "llm-67b"))


@pytest.mark.parametrize("name", sorted(set(TRAINED) - set(LARGE)))
def test_a_small_preset_trains_as_it_is(tmp_path, data_cache, name):
    assert_trained(two_steps(tmp_path, data_cache, name))


@pytest.mark.parametrize("name", LARGE)
def test_a_large_preset_trains_at_small_sizes_with_its_own_router_and_precision(tmp_path, data_cache, name):
    small, model = check(compose([name], shrunken(name)).tree).model, MODELS[name]
    for kept in ("attention", "scoring_func", "topk_method", "n_routed_experts", "n_group", "mtp_depth"):
        assert getattr(small, kept) == getattr(model, kept)
    run = two_steps(tmp_path, data_cache, name, *shrunken(name))
    assert_trained(run)
    assert run.report()["precision"] == "bf16-mixed"
    assert len(run.report()["mtp_loss"]) == model.mtp_depth


@pytest.mark.parametrize("name", LARGE)
def test_a_large_presets_own_shapes_fit_each_other(name):
    """One sample of 64 positions through all its losses, and back, in tensors that have shapes and no numbers."""
    config = check(compose([name]).tree)
    depth, T = config.model.mtp_depth, 64
    with FakeTensorMode():
        model = Transformer(config.model, config.compute.activation_checkpointing)
        compute_as_on_a_gpu(model)  # on a CPU experts' rows are padded, which depends on numbers
        assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(config.model).total
        tokens = torch.zeros(1, T + 1 + depth, dtype=torch.int64)
        targets = torch.full((1, 1 + depth, T), IGNORE)
        with torch.autocast("cpu", torch.bfloat16):  # the presets' bf16-mixed
            losses = model.losses(tokens, torch.ones_like(tokens, dtype=torch.bool), targets)
        (losses.nll_P.sum() + sum(term.sum() for term in losses.balance.values())).backward()
    moe_layers = config.model.num_hidden_layers - config.model.first_k_dense_replace + depth
    assert losses.nll_P.shape == (1 + depth,)
    assert losses.counts_LE.shape == (moe_layers, config.model.n_routed_experts)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_one_head_and_one_moe_layer_are_enough(tmp_path, data_cache):
    """Metrics of one element: torchmetrics hands them out without their dim."""
    run = two_steps(tmp_path, data_cache, "nano", "model.num_nextn_predict_layers=0", "model.num_hidden_layers=2")
    assert_trained(run)
    assert len(run.report()["max_vio_global"]) == 1 and run.report()["mtp_loss"] == []
