"""What kernels decide: the same checks on a CUDA GPU, where there is one, and on the CPU, at small sizes."""

import pytest
import torch
from torch import Tensor

from dsv3_lightning.model.attention_kernels import causal_attention, find_documents
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.losses import linear_cross_entropy
from dsv3_lightning.model.moe import MoE
from dsv3_lightning.model.transformer import Transformer

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
EXACT = 4e-2 if CUDA else 1e-5  # of the largest value
SLICE = ModelConfig(  # two layers of V3's kind
    vocab_size=1024, hidden_size=256, num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=2,
    intermediate_size=512, q_lora_rank=128, kv_lora_rank=64, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    n_routed_experts=32, num_experts_per_tok=4, n_group=4, topk_group=2, moe_intermediate_size=128,
    max_position_embeddings=512, num_nextn_predict_layers=1,
)  # fmt: skip


def close(actual: Tensor, expected: Tensor) -> None:
    error = (actual.double().cpu() - expected.double().cpu()).abs().max() / expected.abs().max().cpu()
    assert error < EXACT, f"differs by {float(error):.1e} of the largest value"


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("widths", [(192, 128), (64, 64)])
def test_attention_is_that_of_fp64(widths, documents):
    torch.manual_seed(0)
    (qk, v), T = widths, 256
    inputs = [torch.randn(2, 4, T, width, device=DEVICE, dtype=DTYPE, requires_grad=True) for width in (qk, qk, v)]
    numbers_BT = torch.arange(T).div(100, rounding_mode="floor").expand(2, T)
    found = find_documents(numbers_BT, DEVICE) if documents else None
    out = causal_attention(*inputs, qk**-0.5, found)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    seen_TT = torch.ones(T, T, dtype=torch.bool, device=DEVICE).tril()
    if documents:
        seen_TT &= (numbers_BT[0][:, None] == numbers_BT[0]).to(DEVICE)
    scores = (wide[0] @ wide[1].transpose(2, 3) * qk**-0.5).masked_fill(~seen_TT, -torch.inf)
    expected = scores.softmax(-1) @ wide[2]
    close(out, expected)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream.double())
    for x, reference in zip(inputs, wide, strict=True):
        close(x.grad, reference.grad)


def test_experts_without_tokens_get_a_gradient_of_exactly_zero():
    """On compute capability 10.x torch's grouped product gives them others (pytorch#172439)."""
    torch.manual_seed(0)
    moe = MoE(SLICE).to(DEVICE)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    used = moe.gate.expert_bias.clone().fill_(-100.0)
    used[8:14] = 0.0  # in two groups
    moe.gate.expert_bias.copy_(used)
    x_BTD = torch.randn(2, 64, SLICE.hidden_size, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
        out, stats = moe(x_BTD, torch.ones(2, 64, dtype=torch.bool, device=DEVICE))
    out.float().square().sum().backward()
    empty_E = (stats.counts_E == 0).cpu()
    assert 16 <= int(empty_E.sum()) < 32
    for weight in moe.experts.parameters():
        largest_E = weight.grad.abs().amax((1, 2)).cpu()
        assert (largest_E[empty_E] == 0).all() and (largest_E[~empty_E] > 0).all()


def test_the_fused_loss_is_that_of_fp64():
    torch.manual_seed(0)
    x = torch.randn(300, 128, device=DEVICE, dtype=DTYPE, requires_grad=True)
    weight = (torch.randn(1000, 128, device=DEVICE) / 10).requires_grad_()
    targets = torch.randint(1000, (300,), device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
        loss = linear_cross_entropy(x, weight, targets)
    wide_x, wide_w = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(wide_x @ wide_w.T, targets, reduction="sum")
    (loss * 0.3 / 7).backward()
    (expected * 0.3 / 7).backward()
    close(loss, expected)
    close(x.grad, wide_x.grad)
    close(weight.grad, wide_w.grad)


def step(policy: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Losses, counts and gradients of a micro-batch, with the same weights and tokens for every policy."""
    with torch.device(DEVICE):
        model = Transformer(SLICE, policy)
    model.init_weights(1)
    tokens = torch.randint(1024, (2, 130), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    targets = torch.stack([tokens[:, 1 + k : 129 + k] for k in range(2)], 1)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
        losses = model.losses(tokens, torch.ones_like(tokens, dtype=torch.bool), targets)
    losses.nll_P.sum().backward()
    return losses.nll_P.detach(), losses.counts_LE, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_recomputation_changes_neither_losses_nor_choices_nor_gradients(policy):
    (nll, counts, gradients), (kept_nll, kept_counts, kept) = step(policy), step("none")
    assert torch.equal(counts, kept_counts)
    close(nll, kept_nll)
    for name, gradient in gradients.items():
        close(gradient, kept[name])
