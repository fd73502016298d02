"""Which parameters Muon updates, and its update against singular values in fp64 and torch.optim.Muon."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.training.adamw import MasterAdamW
from dsv3_lightning.training.muon import Muon, newton_schulz_dtype, orthogonalized, update_scale
from dsv3_lightning.training.optimizer import build_optimizer
from dsv3_lightning.training.precision import BF16Weights
from tests.model.small import small_config
from tests.training.test_optimizer import CONFIG

MUON = replace(CONFIG, kind="muon", lr=1e-2)
SHAPES = [(48, 32), (32, 48), (40, 40), (96, 16)]
GROUPS = {  # the group of each parameter, by name
    r"(embed_tokens|lm_head|layers\.\d+\.mlp\.gate|mtp\.\d+\.block\.mlp\.gate)\.weight": 1,
    r".*norm\.weight": 2,
    r".*_proj(_with_mqa)?\.weight|.*experts\.(gate_up|down)_proj": 0,
}


def matrices(count=4, rows=48, columns=32, seed=0):
    return torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(seed))


def muon_of(*weights, joined=(), dtype=torch.float32, moments=torch.float32, decay=0.1):
    groups = [{"params": [*weights], "weight_decay": decay}]
    return Muon(groups, {*joined}, dtype, moments, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)


def steps(optimizer, weights, count=4, seed=1):
    for number in range(count):
        for place, weight in enumerate(weights):
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed + 10 * number + place))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("tied", [False, True])
def test_matrices_are_muons_and_embedding_head_routers_and_norms_are_adamws(tied):
    model = Transformer(small_config(tie_word_embeddings=tied, num_nextn_predict_layers=2))
    optimizer = build_optimizer(model, MUON)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    group_of = {id(m): i for i, group in enumerate(optimizer.param_groups) for m in group["params"]}
    found = {id(w): group_of[id(m)] for w, m in zip(optimizer.weights, optimizer.masters, strict=True)}
    assert len(found) == len(optimizer.weights) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        expected = [group for pattern, group in GROUPS.items() if re.fullmatch(pattern, name)]
        assert [found[id(parameter)]] == expected, name


@pytest.mark.parametrize("rows, columns", SHAPES)
def test_newton_schulz_keeps_directions_and_makes_singular_values_about_one(rows, columns):
    """Against the singular value decomposition in fp64, from which U p(S) Vᵀ follows for the polynomial p."""
    x_NRC = matrices(3, rows, columns)
    u, s, vt = torch.linalg.svd(x_NRC.double(), full_matrices=False)
    p = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        p = 3.4445 * p - 4.7750 * p**3 + 2.0315 * p**5
    found = orthogonalized(x_NRC)
    torch.testing.assert_close(found.double(), (u * p[:, None]) @ vt, rtol=0, atol=1e-4)
    well = s / s.norm(dim=1, keepdim=True) > 1 / 400  # a square matrix has singular values near 0
    values = p[well]
    assert well.float().mean() > 0.9 and 0.68 < float(values.min()) and float(values.max()) < 1.21
    root_mean_square = (update_scale(rows, columns) * found).square().mean((1, 2)).sqrt()
    assert bool(((root_mean_square > 0.15) & (root_mean_square < 0.24)).all())


def test_newton_schulz_runs_in_the_dtype_of_the_runs_matrix_products():
    assert newton_schulz_dtype("32-true") == torch.float32
    assert newton_schulz_dtype("bf16-mixed") == newton_schulz_dtype("bf16-true") == torch.bfloat16
    half, full = orthogonalized(matrices().bfloat16()), orthogonalized(matrices())
    assert half.dtype == torch.bfloat16
    assert float((half.float() - full).norm() / full.norm()) < 0.02
    assert torch.equal(orthogonalized(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))  # of an expert without tokens


def test_steps_are_those_of_torch_optim_muon():
    """Its update is computed in bf16. Weights come from the same gradients, with momentum and decay."""
    weights = [nn.Parameter(matrices(1, *shape)[0]) for shape in SHAPES]
    others = [nn.Parameter(weight.detach().clone()) for weight in weights]
    theirs = torch.optim.Muon(others, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    ours, starts = muon_of(*weights, dtype=torch.bfloat16), [weight.detach().clone() for weight in weights]
    steps(ours, weights, 6)
    for number in range(6):
        for place, weight in enumerate(others):
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1 + 10 * number + place))
        theirs.step()
    for weight, other, start in zip(weights, others, starts, strict=True):
        assert float(((weight - other).norm() / (other - start).norm()).detach()) < 0.01


def test_each_experts_gate_up_and_down_are_matrices_of_their_own():
    gate, up, down = (matrices(3, *shape, seed=seed) for seed, shape in enumerate(((16, 24), (16, 24), (24, 16))))
    stacked = [nn.Parameter(torch.cat((gate, up), 2)), nn.Parameter(down.clone())]
    apart = [nn.Parameter(matrix.clone()) for stack in (gate, up, down) for matrix in stack]
    optimizer, others = muon_of(*stacked, joined=stacked[:1]), muon_of(*apart)
    for number in range(3):
        gradients = [matrices(3, *stack.shape[1:], seed=100 * number + i) for i, stack in enumerate((gate, up, down))]
        stacked[0].grad, stacked[1].grad = torch.cat(gradients[:2], 2), gradients[2].clone()
        for weight, gradient in zip(apart, [one for stack in gradients for one in stack], strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
        others.step()
    expected = [torch.stack(apart[3 * i : 3 * i + 3]) for i in range(3)]
    torch.testing.assert_close(stacked[0].detach(), torch.cat(expected[:2], 2).detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(stacked[1].detach(), expected[2].detach(), rtol=0, atol=1e-6)


def test_a_batch_of_matrices_that_is_too_large_is_worked_on_in_parts(monkeypatch):
    whole, parted = (nn.Parameter(matrices(5, 8, 6)) for _ in range(2))
    steps(muon_of(whole), [whole])
    monkeypatch.setattr("dsv3_lightning.training.muon.MOST", 100)
    optimizer = muon_of(parted)
    assert [item.stop - item.start for _, items in optimizer.items for item in items] == [2, 2, 1]
    steps(optimizer, [parted])
    torch.testing.assert_close(parted, whole, rtol=0, atol=1e-6)


def test_a_weight_without_a_gradient_stays_and_keeps_its_momentum():
    weights = [nn.Parameter(matrices(1)[0]), nn.Parameter(matrices(1, seed=1)[0])]
    optimizer = muon_of(*weights)
    steps(optimizer, weights, 2)
    before, state = weights[1].detach().clone(), copy.deepcopy(optimizer.state_dict()["state"][1])
    steps(optimizer, weights[:1], 1)
    assert torch.equal(weights[1], before)
    after = optimizer.state_dict()["state"][1]
    assert all(torch.equal(value, after[name]) for name, value in state.items())


def test_bf16_weights_follow_fp32_ones_by_master_copies():
    torch.manual_seed(0)
    layer = nn.Linear(32, 48, bias=False)
    full = nn.Parameter(layer.weight.detach().clone())
    BF16Weights().convert_module(layer)
    optimizer = muon_of(layer.weight)
    steps(optimizer, [layer.weight])
    steps(muon_of(full), [full])
    assert layer.weight.dtype == torch.bfloat16 and torch.equal(layer.weight, full.bfloat16())
    torch.testing.assert_close(optimizer.masters[0], full, rtol=0, atol=1e-6)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_a_saved_state_continues_to_the_bit_and_is_one_momentum_per_matrix(moments):
    def make():
        weights = [nn.Parameter(matrices(3, 16, 24)), nn.Parameter(matrices(1)[0]), nn.Parameter(torch.ones(8))]
        groups = [{"params": weights[:2], "weight_decay": 0.1}, {"params": weights[2:], "weight_decay": 0.0}]
        return weights, Muon(groups, set(), torch.float32, moments, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, fused=True)

    weights, optimizer = make()
    steps(optimizer, weights, 3)
    others, resumed = make()
    with torch.no_grad():
        for other, weight in zip(others, weights, strict=True):
            other.copy_(weight)
    saved = copy.deepcopy(optimizer.state_dict())
    assert [sorted(values) for values in saved["state"].values()] == [
        ["momentum_buffer", "step"], ["momentum_buffer", "step"], ["exp_avg", "exp_avg_sq", "step"]
    ]  # fmt: skip
    assert {value.dtype for values in saved["state"].values() for value in values.values() if value.dim()} == {moments}
    resumed.load_state_dict(saved)
    steps(optimizer, weights, 2, seed=7)
    steps(resumed, others, 2, seed=7)
    assert all(torch.equal(one, other) for one, other in zip(weights, others, strict=True))


def test_vectors_and_tables_move_as_under_adamw():
    model = Transformer(small_config())
    model.init_weights(0)
    other = copy.deepcopy(model)
    muon, adamw = build_optimizer(model, MUON), build_optimizer(other, replace(MUON, kind="adamw", moments="fp32"))
    assert isinstance(muon, Muon) and not isinstance(adamw, MasterAdamW)
    for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
        parameter.grad = torch.full_like(parameter, 0.1)
        twin.grad = parameter.grad.clone()
    muon.step()
    adamw.step()
    twins = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        of_muon = any(group == 0 for pattern, group in GROUPS.items() if re.fullmatch(pattern, name))
        assert torch.equal(parameter, twins[name]) != of_muon, name
