"""Which parameters decay, and what a step does to low-precision weights."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.training.adamw import MasterAdamW
from dsv3_lightning.training.config import OptimizerConfig, Phase
from dsv3_lightning.training.optimizer import build_optimizer
from dsv3_lightning.training.precision import BF16Weights
from tests.model.small import small_config

CONFIG = OptimizerConfig(
    kind="adamw", lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, moments="fp32", warmup_steps=0,
    phases=[Phase(until=1.0, shape="constant", to=1.0)], max_skipped_steps=1,
)  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_in_one_group_once_and_only_matrices_decay(tied):
    model = Transformer(small_config(tie_word_embeddings=tied, num_nextn_predict_layers=2))
    groups = build_optimizer(model, CONFIG).param_groups
    decayed, free = ({id(p) for p in group["params"]} for group in groups)
    assert sum(len(group["params"]) for group in groups) == len(decayed | free) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert (id(parameter) in free) == ("norm" in name), name
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_bf16_weights_follow_fp32_ones():
    """At lr 1e-5 nearly every update of a bf16 weight rounds away without a master copy."""
    torch.manual_seed(0)
    full = torch.nn.Parameter(torch.randn(64, 64).bfloat16().float())
    half = torch.nn.Parameter(full.detach().bfloat16())
    naive = nn.Parameter(half.detach().clone())
    start = half.detach().clone()
    expected = torch.optim.AdamW([full], lr=1e-5, betas=CONFIG.betas, eps=CONFIG.eps, weight_decay=0.1)
    actual = MasterAdamW([{"params": [half], "weight_decay": 0.1}], lr=1e-5, betas=CONFIG.betas, eps=CONFIG.eps)
    without = torch.optim.AdamW([naive], lr=1e-5, betas=CONFIG.betas, eps=CONFIG.eps, weight_decay=0.1)
    for _ in range(300):
        gradient = (torch.randn(64, 64) + 2).bfloat16()  # mostly one way: 300 steps of 1e-5 add up to 0.003
        full.grad, half.grad, naive.grad = gradient.float(), gradient, gradient
        expected.step()
        without.step()
        actual.step()
        actual.zero_grad()
        assert half.grad is None
    torch.testing.assert_close(actual.masters[0], full, rtol=0, atol=0)
    assert torch.equal(half, full.bfloat16())
    assert (half != start).float().mean() > 3 * (naive != start).float().mean()


def test_master_copies_survive_saving_to_the_bit():
    def make() -> tuple[torch.nn.Parameter, MasterAdamW]:
        weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
        return weight, MasterAdamW([{"params": [weight]}], lr=1e-5)

    def train(weight: torch.nn.Parameter, optimizer: MasterAdamW, steps: range) -> None:
        for step in steps:
            weight.grad = torch.full_like(weight, 1.0 + step)
            optimizer.step()

    weight, optimizer = make()
    train(weight, optimizer, range(10))
    resumed_weight, resumed = make()
    resumed_weight.data.copy_(weight.data)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(weight, optimizer, range(10, 20))
    train(resumed_weight, resumed, range(10, 20))
    assert torch.equal(resumed.masters[0], optimizer.masters[0])  # bf16 alone would have forgotten all ten steps
    assert float(optimizer.masters[0][0, 0]) != 1.0


def test_master_copies_begin_as_the_weights_were_before_they_were_rounded():
    torch.manual_seed(0)
    layer = nn.Linear(8, 8, bias=False)
    start = layer.weight.detach().clone()
    BF16Weights().convert_module(layer)
    optimizer = MasterAdamW([{"params": [layer.weight]}], lr=1e-5)
    assert layer.weight.dtype == torch.bfloat16 and torch.equal(optimizer.masters[0], start)
    state = optimizer.state_dict()
    del state["masters"]  # as sharded runs save it
    optimizer.load_state_dict(state)
    assert torch.equal(optimizer.masters[0], start)


def test_bf16_moments_are_rounded_after_each_fp32_step():
    """Against AdamW's equations in fp64, with both moments rounded where the optimizer stores them."""
    torch.manual_seed(0)
    weight, (beta1, beta2), lr, eps = nn.Parameter(torch.randn(32, 16)), CONFIG.betas, 1e-2, CONFIG.eps
    optimizer = MasterAdamW([{"params": [weight], "weight_decay": 0.1}], torch.bfloat16, lr=lr, betas=CONFIG.betas,
                            eps=eps)  # fmt: skip
    expected, first, second = weight.detach().double(), torch.zeros(32, 16).double(), torch.zeros(32, 16).double()
    for step in range(1, 6):
        weight.grad = torch.randn(32, 16)
        first = beta1 * first + (1 - beta1) * weight.grad.double()
        second = beta2 * second + (1 - beta2) * weight.grad.double().square()
        update = first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + eps)
        expected = expected * (1 - lr * 0.1) - lr * update
        first, second = first.bfloat16().double(), second.bfloat16().double()
        optimizer.step()
        torch.testing.assert_close(weight.double(), expected, rtol=0, atol=2e-4)  # a moment may round the other way
    state = optimizer.state[optimizer.masters[0]]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    assert (state["exp_avg"].double() == first).float().mean() > 0.99
    assert (state["exp_avg_sq"].double() == second).float().mean() > 0.99
    assert "masters" not in optimizer.state_dict()  # an fp32 weight needs no copy


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_moments_saved_in_either_dtype_continue_in_the_other(moments):
    weight = nn.Parameter(torch.ones(4, 4))

    def build(moments: str) -> torch.optim.Optimizer:
        model = nn.Module()
        model.weight = weight
        return build_optimizer(model, replace(CONFIG, moments=moments))

    saved, loaded = build(moments), build("bf16" if moments == "fp32" else "fp32")
    weight.grad = torch.full((4, 4), 0.3)
    saved.step()
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    for before, after in zip(saved.state.values(), loaded.state.values(), strict=True):
        assert after["exp_avg"].dtype != before["exp_avg"].dtype
        torch.testing.assert_close(after["exp_avg"].bfloat16(), before["exp_avg"].bfloat16())
        assert float(after["step"]) == 1
    loaded.step()
