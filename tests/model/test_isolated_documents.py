"""Documents packed into one sample, isolated: each as if it were alone, for both attentions and every head."""

from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from dsv3_lightning.model import transformer
from dsv3_lightning.model.attention_kernels import find_documents
from dsv3_lightning.model.config import Yarn
from dsv3_lightning.model.losses import IGNORE
from dsv3_lightning.training.balance import count_step
from tests.hub.folders import LLAMA

from .small import small_config, small_model
from .test_losses import LargestTensor

LENGTHS = (7, 12, 3, 9)
DEEP = {"num_nextn_predict_layers": 2}
MODELS = {
    "mla": small_config(**DEEP),
    "parallel heads": small_config(**DEEP, mtp_kind="parallel"),
    "yarn": small_config(**DEEP, rope_scaling=Yarn(factor=4, original_max_position_embeddings=64)),
    "gqa": small_config(**LLAMA),
}


class Packed(NamedTuple):
    """Documents one after the other and padding behind, as the data packs them: each [1, …]."""

    tokens: Tensor
    mask: Tensor
    targets: Tensor
    documents: Tensor


def pack(parts: list[Tensor], depth: int, padding: int = 5) -> Packed:
    """No document predicts into another one."""
    T = sum(map(len, parts)) + padding
    tokens_S = torch.full((T + 1 + depth,), 3)
    document_S, targets_PT = torch.full_like(tokens_S, -1), torch.full((1 + depth, T), IGNORE)
    begin = 0
    for number, part in enumerate(parts):
        end = begin + len(part)
        tokens_S[begin:end], document_S[begin:end] = part, number
        for k in range(1 + depth):
            targets_PT[k, begin : max(begin, end - 1 - k)] = part[1 + k :]
        begin = end
    return Packed(*(x[None] for x in (tokens_S, document_S >= 0, targets_PT, document_S)))


def documents(vocab: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (length,), generator=generator) for length in LENGTHS]


def losses(model: torch.nn.Module, packed: Packed, isolated: bool = True):
    tokens, mask, targets, numbers = packed
    return model.losses(tokens, mask, targets, documents_BS=numbers if isolated else None)  # type: ignore[operator]


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_each_document_alone(name: str) -> None:
    model, depth = small_model(MODELS[name]), MODELS[name].mtp_depth
    parts = documents(61)
    together = losses(model, pack(parts, depth)).nll_P
    (together * torch.tensor([1.0, 0.3, 0.2])[: 1 + depth]).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    alone = torch.stack([losses(model, pack([part], depth, padding=0)).nll_P for part in parts])
    torch.testing.assert_close(together, alone.sum(0), rtol=1e-5, atol=1e-5)
    (alone.sum(0) * torch.tensor([1.0, 0.3, 0.2])[: 1 + depth]).sum().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-4)
    seen = losses(model, pack(parts, depth), isolated=False).nll_P
    assert ((seen - together).abs() > 0.1).all()  # it isn't the same without


@pytest.mark.parametrize("name", ["mla", "gqa"])
@torch.no_grad()
def test_no_token_of_another_document_matters(name: str) -> None:
    """Main head: every place's output. MTP modules: every place that has a target."""
    model, depth = small_model(MODELS[name]), MODELS[name].mtp_depth
    parts = documents(61)
    others = [part if number == 1 else other for number, (part, other) in enumerate(zip(parts, documents(61, 1)))]
    first, second = pack(parts, depth), pack(others, depth)
    begin, end = LENGTHS[0], LENGTHS[0] + LENGTHS[1]
    own = torch.full_like(first.targets, IGNORE)
    own[..., begin:end] = first.targets[..., begin:end]
    found = [losses(model, packed._replace(targets=own)).nll_P for packed in (first, second)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(*(losses(model, p._replace(targets=own), isolated=False).nll_P for p in (first, second)))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputation_keeps_every_bit(how: str, autocast: bool) -> None:
    found = []
    for checkpointing in ("none", how):
        model = small_model(MODELS["mla"], activation_checkpointing=checkpointing)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            nll_P = losses(model, pack(documents(61), 2)).nll_P
        nll_P.sum().backward()
        found.append([nll_P, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_nothing_of_a_step_grows_with_the_square_of_the_length() -> None:
    """Neither a mask nor scores of T² numbers, forward and backward; documents are found once for all layers."""
    config = small_config(n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, vocab_size=61)
    model, T = small_model(config), 1000
    parts = [torch.randint(61, (length,)) for length in (1, 600, 1, 1, 397)]
    with LargestTensor() as largest, mock.patch.object(transformer, "find_documents", wraps=find_documents) as found:
        losses(model, pack(parts, 0, padding=0)).nll_P.sum().backward()
    assert found.call_count == 1
    assert largest.numel < T * T / 4


@torch.no_grad()
def test_the_step_is_counted_as_it_will_be_routed() -> None:
    model = small_model(MODELS["mla"])
    packed = pack(documents(61), 2)
    counted = count_step(model, packed.tokens, packed.mask, packed.documents, 1)
    assert torch.equal(counted, losses(model, packed).counts_LE)
    assert not torch.equal(counted, count_step(model, packed.tokens, packed.mask, None, 1))
