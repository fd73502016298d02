"""Activation checkpointing and gradient accumulation change memory and work, but no loss, gradient or expert count."""

from collections import Counter
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_lightning.model.block import Block
from dsv3_lightning.model.transformer import Losses, Transformer

from .small import Batch, clear_batch, routers, small_batch, small_config, small_model, total_loss

CONFIG = small_config(num_nextn_predict_layers=2)
BLOCKS = 5  # one dense, two MoE, two in MTP modules
MOE_BLOCKS = 4


def model_and_batch(policy: str) -> tuple[Transformer, Batch]:
    model = small_model(CONFIG, activation_checkpointing=policy)
    return model, clear_batch(model, padding=(0, 4))


def losses_and_gradients(policy: str, autocast: bool = False) -> tuple[Losses, dict[str, Tensor]]:
    model, batch = model_and_batch(policy)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = model.losses(*batch)
        loss = total_loss(losses, batch.targets)
    loss.backward()
    return losses, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("policy", ["selective", "full"])
def test_losses_gradients_and_counts_are_those_without(policy, autocast):
    plain, plain_gradients = losses_and_gradients("none", autocast)
    losses, gradients = losses_and_gradients(policy, autocast)
    assert torch.equal(losses.nll_P, plain.nll_P)
    assert torch.equal(losses.balance["sequence"], plain.balance["sequence"])
    assert torch.equal(losses.counts_LE, plain.counts_LE)  # recomputation doesn't count twice
    for name, gradient in gradients.items():
        assert torch.equal(gradient, plain_gradients[name]), name


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_near_ties_that_flip_in_the_recomputation_change_no_gradient(policy):
    """A second pass that rounds otherwise: biases that differ by 1e-6 decide between experts that are as good.

    The biases take part in the choice alone, so the choice kept, every gradient is the same to the bit.
    """
    plain, plain_gradients, _ = with_near_ties("none")
    losses, gradients, flipped = with_near_ties(policy)
    assert flipped > 10
    assert torch.equal(losses.counts_LE, plain.counts_LE)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, plain_gradients[name]), name


def with_near_ties(policy: str) -> tuple[Losses, dict[str, Tensor], int]:
    """Losses, gradients, and how many choices flip when the biases move as they do before the backward pass."""
    model = small_model(CONFIG, activation_checkpointing=policy)
    batch = small_batch(CONFIG, padding=(0, 4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for router in routers(model):  # every expert and the next are the same to the router
            for values in (router.weight, router.expert_bias):
                values[1::2] = values[::2]
    losses = model.losses(*batch)
    for router in routers(model):
        router.expert_bias += 1e-6 * torch.randn(router.expert_bias.shape, generator=generator)
    total_loss(losses, batch.targets).backward()
    with torch.no_grad():
        flipped = (model.losses(*batch).counts_LE - losses.counts_LE).abs().sum()
    return losses, {name: parameter.grad for name, parameter in model.named_parameters()}, int(flipped)


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_a_step_draws_no_random_number_and_saves_no_generator(policy):
    """Saving and restoring the state of CUDA's generator would cost a copy from the GPU per block."""
    model, batch = model_and_batch(policy)
    state = torch.get_rng_state()
    with mock.patch("torch.get_rng_state", side_effect=AssertionError):
        total_loss(model.losses(*batch), batch.targets).backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_full_makes_every_block_again_in_the_backward_pass():
    assert {policy: block_calls(policy) for policy in ("none", "full")} == {"none": BLOCKS, "full": 2 * BLOCKS}


def block_calls(policy: str) -> int:
    model, batch = model_and_batch(policy)
    calls = 0

    def count(*_args) -> None:
        nonlocal calls
        calls += 1

    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(count)
    total_loss(model.losses(*batch), batch.targets).backward()
    return calls


class Operations(TorchDispatchMode):
    """Counts the operations that really run, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.runs[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operations(policy: str) -> tuple[Counter, Counter]:
    """Of the forward and of the backward pass."""
    model, batch = model_and_batch(policy)
    with Operations() as forward:
        loss = total_loss(model.losses(*batch), batch.targets)
    with Operations() as backward:
        loss.backward()
    return forward.runs, backward.runs


def test_selective_makes_norms_and_activations_again_but_no_product_and_no_choice():
    forward, plain = operations("none")
    _, selective = operations("selective")
    _, full = operations("full")
    assert forward["mm"] > 40 and forward["_grouped_mm"] == 2 * MOE_BLOCKS and attention(forward) == BLOCKS

    for product in ("mm", "_grouped_mm", "bmm", "topk"):
        assert selective[product] == plain[product]
    assert attention(selective) == attention(plain) == 0
    # One in each shared expert, too. The experts' backward pass has another of its own.
    assert selective["silu"] - plain["silu"] == forward["silu"] == BLOCKS + MOE_BLOCKS
    assert selective["sigmoid"] == forward["sigmoid"] == MOE_BLOCKS
    # Four norms in a block, two more before a module's projection; final norms lie outside.
    assert norms(selective) == 4 * BLOCKS + 2 * 2

    # Full makes the products again too, but for those whose result nothing in the backward pass needs.
    assert full["_grouped_mm"] == plain["_grouped_mm"] + forward["_grouped_mm"] // 2
    assert attention(full) == attention(forward)
    assert full["topk"] == plain["topk"] == 0  # but no choice is made twice
    assert full["mm"] > plain["mm"] + 40


def attention(runs: Counter) -> int:
    return runs["baddbmm"]


def norms(runs: Counter) -> int:
    return runs["rsqrt"] + runs["_fused_rms_norm"]


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_four_micro_batches_add_up_to_the_large_batch(policy):
    model = small_model(CONFIG, activation_checkpointing=policy)
    batch = clear_batch(model, B=8, padding=(0, 4, 0, 0, 9, 0, 0, 1))
    whole = model.losses(*batch)
    (whole.nll_P.sum() + whole.balance["sequence"].sum()).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.zero_grad()
    parts = []
    for start in range(0, 8, 2):
        part = model.losses(*(t[start : start + 2] for t in batch))
        (part.nll_P.sum() + part.balance["sequence"].sum() / 4).backward()  # the balance loss is a mean over sequences
        parts.append(part)
    assert torch.equal(torch.stack([part.counts_LE for part in parts]).sum(0), whole.counts_LE)
    torch.testing.assert_close(torch.stack([part.nll_P for part in parts]).sum(0), whole.nll_P, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        torch.stack([part.balance["sequence"] for part in parts]).mean(0), whole.balance["sequence"]
    )
    for name, parameter in model.named_parameters():
        difference = (parameter.grad - gradients[name]).abs().max()
        assert difference <= 1e-5 * gradients[name].abs().max(), name
