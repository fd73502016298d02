"""Gradients of every parameter: fp64 against finite differences, then the fp32 that trains against fp64.

The model computes affinities and rotations in fp32 whatever its dtype, and torch's grouped product knows no fp64. For
the fp64 side, `.float()` leaves fp64 alone and the grouped product is a loop; the fp32 side runs the code as it is.
"""

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from dsv3_lightning.model.config import Yarn
from dsv3_lightning.model.experts import Experts
from dsv3_lightning.model.transformer import Transformer

from .small import Batch, clear_batch, small_config, small_model, total_loss

pytestmark = pytest.mark.slow

SHAPES = {
    "V3: groups, bias, MTP of depth 2, YaRN, compressed queries": {
        "rope_scaling": Yarn(factor=4, original_max_position_embeddings=8, mscale=0.7, mscale_all_dim=1.0)
    },
    "plain queries, tied head, no shared expert": {
        "q_lora_rank": None,
        "tie_word_embeddings": True,
        "n_shared_experts": 0,
        "rope_interleave": False,
    },
    "V2: softmax, gates not normalized": {
        "scoring_func": "softmax",
        "topk_method": "group_limited_greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 16.0,
    },
}


@pytest.fixture(params=SHAPES)
def model_and_batch(request) -> tuple[Transformer, Batch]:
    config = small_config(num_hidden_layers=2, num_nextn_predict_layers=2, **SHAPES[request.param])
    softmax = config.scoring_func == "softmax"
    model = small_model(config, bias=(0.0, 0.02) if softmax else (-0.5, 0.1))
    batch = clear_batch(model, B=2, T=20, padding=(0, 5))
    assert model.losses(*batch).counts_LE.min() > 0  # every expert of every layer has work, and so a gradient
    return model, batch


@contextmanager
def fp64_kept(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "float", lambda x: x.to(torch.promote_types(x.dtype, torch.float32)))
        for name in ("gate_up_product", "down_product"):
            patch.setattr(Experts, name, staticmethod(loop_over_experts))
        yield


def loop_over_experts(x_RD: Tensor, weight_EDF: Tensor, offsets_E: Tensor) -> Tensor:
    parts = x_RD.tensor_split(offsets_E[:-1].tolist())
    return torch.cat([part @ weight for part, weight in zip(parts, weight_EDF, strict=True)])


def test_gradients_of_every_parameter_equal_finite_differences(model_and_batch, monkeypatch):
    model, batch = model_and_batch
    model.double()
    generator = torch.Generator().manual_seed(0)
    with fp64_kept(monkeypatch):
        gradients = loss_gradients(model, batch)
        for name, parameter in model.named_parameters():
            gradient = gradients[name].flatten()
            largest = gradient.abs().topk(3).indices
            random = torch.randint(len(gradient), (2,), generator=generator)
            for i in torch.cat((largest, random)).tolist():
                slope = central_difference(model, batch, parameter.data.view(-1), i)
                assert gradient[i].item() == pytest.approx(slope, rel=1e-5, abs=1e-7), f"{name}[{i}]"


def test_fp32_gradients_of_every_parameter_equal_fp64(model_and_batch, monkeypatch):
    model, batch = model_and_batch
    gradients = loss_gradients(model, batch)
    with fp64_kept(monkeypatch):
        exact = loss_gradients(copy.deepcopy(model).double(), batch)
    for name, gradient in gradients.items():
        error = (gradient.double() - exact[name]).abs().max() / exact[name].abs().max()
        assert error < 2e-5, name


def test_every_parameter_and_every_expert_gets_a_gradient(model_and_batch):
    model, batch = model_and_batch
    for name, gradient in loss_gradients(model, batch).items():
        assert gradient.abs().max() > 1e-6, name
        if gradient.dim() == 3:  # [E, ., .]
            assert gradient.abs().amax((1, 2)).min() > 1e-6, name


def loss_gradients(model: Transformer, batch: Batch) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = total_loss(model.losses(*batch), batch.targets)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@torch.no_grad()
def central_difference(model: Transformer, batch: Batch, values: Tensor, i: int, step: float = 1e-5) -> float:
    """The step is too small to change any choice of experts: clear_batch keeps those 3e-5 apart."""
    before, sides = values[i].item(), []
    for sign in (1, -1):
        values[i] = before + sign * step
        sides.append(total_loss(model.losses(*batch), batch.targets).item())
    values[i] = before
    return (sides[0] - sides[1]) / (2 * step)
