"""Two halves of a batch that take turns in every block give the losses and gradients of the whole batch."""

import pytest
import torch
from torch import Tensor

from dsv3_lightning.model.balance_table import BALANCE_LOSSES
from dsv3_lightning.model.phases import TURNS, TwoBatches, in_halves, overlap_halves, take_turns
from dsv3_lightning.model.transformer import Losses

from .small import clear_batch, small_config, small_model

CONFIG = small_config(num_nextn_predict_layers=2)
LOSSES = tuple(BALANCE_LOSSES)


def losses_and_gradients(
    policy: str, overlap: bool, B: int = 3, documents: Tensor | None = None
) -> tuple[Losses, dict[str, Tensor]]:
    model = small_model(CONFIG, activation_checkpointing=policy, balance=LOSSES)
    batch = clear_batch(model, B=B, padding=(0, 4, 1)[:B])
    if overlap:
        overlap_halves(model)
    losses = model.losses(*batch, documents_BS=documents)
    weights = torch.rand(8, generator=torch.Generator().manual_seed(0))
    terms = [(term * weights if BALANCE_LOSSES[name].whole_batch else term).sum()
             for name, term in losses.balance.items()]  # fmt: skip
    (losses.nll_P.sum() / 10 + sum(terms)).backward()
    return losses, {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(found: tuple[Losses, dict[str, Tensor]], plain: tuple[Losses, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0].nll_P, plain[0].nll_P)
    assert torch.equal(found[0].counts_LE, plain[0].counts_LE)
    assert found[0].balance.keys() == set(LOSSES)
    for name, term in plain[0].balance.items():
        torch.testing.assert_close(found[0].balance[name], term)
    for name, gradient in plain[1].items():
        error = (found[1][name] - gradient).norm() / gradient.norm()
        assert error < 1e-5, f"{name}: differs by {error:.1e} of its norm"


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_losses_of_all_kinds_gradients_and_counts_are_those_of_the_whole(policy):
    """Three sequences, so that the halves are unequal, with padding; MTP of depth 2; one dense layer."""
    assert_same(losses_and_gradients(policy, True), losses_and_gradients("none", False))


@pytest.mark.parametrize("B", [1, 2])
def test_one_sequence_stays_alone(B):
    assert_same(losses_and_gradients("full", True, B), losses_and_gradients("none", False, B))


def test_documents_stay_apart_in_both_halves():
    documents_BS = torch.tensor([[0] * 15, [1] * 4 + [2] * 11, [3] * 9 + [4] * 2 + [5] * 4])
    apart = losses_and_gradients("selective", True, 3, documents_BS)
    assert_same(apart, losses_and_gradients("none", False, 3, documents_BS))
    assert not torch.equal(apart[0].nll_P, losses_and_gradients("none", False)[0].nll_P)


def test_without_gradients_the_sequences_stay_together():
    """Ranks may then have different numbers of sequences, and all of them must call the same collectives."""
    model = small_model(CONFIG)
    batch, calls = clear_batch(model, B=4), []
    overlap_halves(model)
    for layer in model.modules():
        if isinstance(layer, TwoBatches):
            raise AssertionError("a module of its own would change the names of the weights")
    model.layers[1].mlp.experts.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model.losses(*batch)
    assert len(calls) == 1
    model.losses(*batch)
    assert len(calls) == 3


def test_turns_bring_both_halves_to_their_ends():
    def steps(name: str):
        for number in range(4):
            log.append(f"{name}{number}")
            yield
        log.append(f"{name}4")
        return name

    log: list[str] = []
    assert take_turns([steps("a"), steps("b")], TURNS) == ["a", "b"]
    assert log == ["a0", "b0", "a1", "a2", "b1", "a3", "b2", "b3", "a4", "b4"]
    log.clear()
    assert take_turns([steps("a")], TURNS) == ["a"] and log == ["a0", "a1", "a2", "a3", "a4"]


def test_halves_have_the_documents_of_their_sequences():
    from dsv3_lightning.model.attention_kernels import find_documents
    from dsv3_lightning.model.phases import Half

    documents_BT = torch.tensor([[0, 0, 0], [1, 2, 2], [3, 3, 3], [4, 5, 6], [7, 7, 7]])
    whole = Half(torch.randn(5, 3, 2), (torch.empty(0), torch.empty(0)), torch.ones(5, 3, dtype=torch.bool),
                 find_documents(documents_BT, torch.device("cpu")))  # fmt: skip
    first, second = in_halves(whole)
    assert first.documents.lengths == [[3], [1, 2], [3]] and second.documents.lengths == [[1, 1, 1], [3]]
    assert first.documents.cu_seqlens.tolist() == [0, 3, 4, 6, 9]
    assert second.documents.cu_seqlens.tolist() == [0, 1, 2, 3, 6]
    assert torch.equal(torch.cat([first.x_BTD, second.x_BTD]), whole.x_BTD)
