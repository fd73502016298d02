"""bf16 weights and bf16 autocast stay near fp32, and what must be fp32 is: affinities, gates, expert bias, losses."""

import pytest
import torch
from torch import Tensor

from dsv3_lightning.model.losses import IGNORE
from dsv3_lightning.model.router import Router
from dsv3_lightning.model.transformer import Losses, Transformer

from .small import Batch, clear_batch, small_config, small_model, total_loss

# The gap keeps choices of experts from hanging on bf16's rounding in most places; a few may still differ.
CONFIG = small_config(num_nextn_predict_layers=1, qk_nope_head_dim=16, hidden_size=64, initializer_range=0.08)

pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # bf16 input, fp32 norm


def to_bf16(model: Transformer) -> Transformer:
    """Everything in bf16 but norms, routers' weights and expert biases."""
    for module in model.modules():
        if not isinstance(module, Router):
            for parameter in module.parameters(recurse=False):
                if parameter.dim() > 1:
                    parameter.data = parameter.data.bfloat16()
    return model


def backward(model: Transformer, batch: Batch, autocast: bool = False) -> tuple[Losses, dict[str, Tensor]]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = model.losses(*batch)
        loss = total_loss(losses, batch.targets)
    loss.backward()
    return losses, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(params=["autocast", "bf16 weights"])
def fp32_and_bf16(request):
    """Losses, gradients and model of fp32, and of bf16."""
    runs = []
    for half in (False, True):
        model = small_model(CONFIG, bias=(-0.5, 0.5))
        batch = clear_batch(model, B=4, T=24)
        if half and request.param == "bf16 weights":
            model = to_bf16(model)
        runs.append((*backward(model, batch, half and request.param == "autocast"), model, batch))
    return runs


def test_losses_and_gradients_are_within_the_noise_of_bf16(fp32_and_bf16):
    (full, full_gradients, _, batch), (half, half_gradients, _, _) = fp32_and_bf16
    tokens_P = (batch.targets != IGNORE).sum((0, 2))
    assert ((full.nll_P - half.nll_P) / tokens_P).abs().max() < 0.01  # of 4: bf16 keeps 2^-9 of each product
    assert (full.balance["sequence"] / half.balance["sequence"] - 1).abs().max() < 0.02
    assert (full.counts_LE - half.counts_LE).abs().sum() <= 0.03 * full.counts_LE.sum()
    for name, gradient in half_gradients.items():
        cosine = torch.cosine_similarity(gradient.float().flatten(), full_gradients[name].flatten(), dim=0)
        assert cosine > 0.97, name


def test_losses_counts_and_biases_keep_their_dtypes(fp32_and_bf16):
    for losses, gradients, model, _ in fp32_and_bf16:
        assert losses.nll_P.dtype == losses.balance["sequence"].dtype == torch.float32
        assert losses.counts_LE.dtype == torch.int64
        for name, parameter in model.named_parameters():
            assert gradients[name].dtype == parameter.dtype
        for router in (module for module in model.modules() if isinstance(module, Router)):
            assert router.expert_bias.dtype == router.weight.dtype == torch.float32


def test_losses_are_summed_in_fp32_under_autocast():
    # 4,096 tokens lose 4 each: above 8,192 bf16 counts in steps of 64, and such a sum would stall there.
    model = small_model(small_config())
    batch = clear_batch(model, B=64, T=64, gap=0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = model.losses(*batch).nll_P[0]
        parts = sum(model.losses(*(t[b : b + 1] for t in batch)).nll_P[0].double() for b in range(64))
    assert whole > 10_000
    assert whole.item() == pytest.approx(parts.item(), rel=1e-4)


def test_a_bf16_bias_would_lose_the_reports_updates():
    # V3 §4.2: steps of 0.001. Above 0.5 bf16's neighbors are 0.004 apart, so the bias never gets any further.
    bias = {dtype: torch.tensor(0.0, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    for _ in range(1000):
        for value in bias.values():
            value += 0.001
    assert bias[torch.float32].item() == pytest.approx(1, rel=1e-4)
    assert bias[torch.bfloat16].item() <= 0.5

    router = small_model(small_config()).layers[1].mlp.gate
    with torch.no_grad():
        router.expert_bias.zero_()
        for _ in range(1000):
            router.expert_bias += 0.001
    assert router.expert_bias.tolist() == pytest.approx([1] * 8, rel=1e-4)


def test_a_choice_between_close_experts_needs_fp32_biases():
    # Biases that differ by 0.001 at 0.5 are equal in bf16: the choice would go to the wrong expert.
    router = Router(small_config(n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1))
    with torch.no_grad():
        router.weight.zero_()  # all affinities are 0.5
        router.expert_bias.copy_(torch.tensor([0.5, 0.501]))
    x_ND = torch.ones(3, 32)
    assert router.expert_bias.bfloat16().unique().numel() == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert router(x_ND.bfloat16()).experts_NK.flatten().tolist() == [1, 1, 1]


@pytest.mark.parametrize("cast", [Transformer.bfloat16, Transformer.half, lambda model: model.to(torch.bfloat16)])
def test_casting_the_whole_model_leaves_biases_alone_and_routing_in_fp32(cast):
    model = small_model(small_config())
    before = {name: value.clone() for name, value in model.named_buffers()}
    router = cast(model).layers[1].mlp.gate
    assert router.weight.dtype in (torch.bfloat16, torch.float16)
    for name, value in model.named_buffers():
        assert value.dtype == torch.float32 and torch.equal(value, before[name]), name
    routing = router(torch.ones(3, 32, dtype=router.weight.dtype))
    assert routing.scores_NE.dtype == routing.gates_NK.dtype == torch.float32


def test_a_cast_to_fp64_and_a_move_take_the_bias_along():
    router = small_model(small_config()).layers[1].mlp.gate
    assert router.double().expert_bias.dtype == torch.float64
    assert router.to("meta").expert_bias.is_meta
