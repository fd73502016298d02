"""Each balance loss and its gradient against loops over its paper's equations in fp64, and however the work is spread.

The gradient is taken by the logits, so that one that f should not carry, or P should, would show.
"""

import math

import pytest
import torch
from torch import Tensor

from dsv3_lightning.model.balance import Choices, balance_terms, batch_loss, check_complete
from dsv3_lightning.model.balance_table import BALANCE_LOSSES

from .small import clear_batch, small_config, small_model

E, K, G, M = 6, 2, 3, 2  # experts, of which a token gets two, out of at most two of three groups
NAMES = tuple(BALANCE_LOSSES)
WHOLE_BATCH = [loss.name for loss in BALANCE_LOSSES.values() if loss.whole_batch]


def random_choices(lengths: list[int], scoring: str = "sigmoid", seed: int = 0) -> Choices:
    """fp64. Choices are not those of the K largest scores; experts are skewed; what lies behind a length is padding."""
    generator = torch.Generator().manual_seed(seed)
    B, T, skew = len(lengths), max(lengths), torch.arange(E) / 2
    logits_BTE = (torch.randn(B, T, E, generator=generator, dtype=torch.float64) + skew - 1).requires_grad_()
    scores_BTE = logits_BTE.sigmoid() if scoring == "sigmoid" else logits_BTE.softmax(-1)
    choice_BTE = torch.rand(B, T, E, generator=generator, dtype=torch.float64) + skew / 2
    closed_BT1 = torch.randint(G, (B, T, 1), generator=generator)
    choice_BTE = choice_BTE.masked_fill(torch.arange(E) // (E // G) == closed_BT1, -1)
    mask_BT = torch.arange(T) < torch.tensor(lengths)[:, None]
    return Choices(logits_BTE, scores_BTE, choice_BTE.topk(K).indices, mask_BT, G, M)


def rows(choices: Choices, b: slice) -> Choices:
    return Choices(*(x[b] for x in choices[:4]), *choices[4:])


def counts(choices: Choices) -> Tensor:
    return torch.bincount(choices.experts_BTK[choices.mask_BT].flatten(), minlength=E)


def value(name: str, choices: Choices, counts_E: Tensor | None = None) -> Tensor:
    """The loss as training puts it together; counts_E: those of the whole step."""
    term = balance_terms((name,), choices)[name]
    if name not in WHOLE_BATCH:
        return term
    return batch_loss(term[None], (counts(choices) if counts_E is None else counts_E)[None], K)[0]


def reference(name: str, choices: Choices) -> Tensor:
    """Sum after sum, over lists of tokens; f are plain numbers."""
    tokens = [
        [(choices.logits_BTE[b, t], choices.scores_BTE[b, t], choices.experts_BTK[b, t].tolist())
         for t in range(choices.mask_BT.shape[1]) if choices.mask_BT[b, t]]
        for b in range(len(choices.mask_BT))
    ]  # fmt: skip
    if name in WHOLE_BATCH:
        return of_tokens(name, [token for sequence in tokens for token in sequence])
    return sum(of_tokens(name, sequence) for sequence in tokens) / len(tokens)


def of_tokens(name: str, tokens: list) -> Tensor:
    T = len(tokens)
    if name == "z":  # arXiv 2202.08906 eq. 5
        return sum(logits.exp().sum().log() ** 2 for logits, _, _ in tokens) / T
    f = [E / (K * T) * sum(i in chosen for _, _, chosen in tokens) for i in range(E)]  # V3 eq. 18, V2 eq. 24
    if name in ("sequence", "batch"):  # V3 eq. 17, 19, 20
        return sum(f[i] * sum(s[i] / s.sum() for _, s, _ in tokens) / T for i in range(E))
    if name == "switch":  # arXiv 2101.03961 eq. 4-6, with K choices per token
        return sum(f[i] * sum(z.exp()[i] / z.exp().sum() for z, _, _ in tokens) / T for i in range(E))
    P = [sum(s[i] for _, s, _ in tokens) / T for i in range(E)]  # V2 eq. 25
    if name == "expert":
        return sum(f[i] * P[i] for i in range(E))
    groups = [range(d * E // G, (d + 1) * E // G) for d in range(G)]
    if name == "device":  # V2 eq. 26-28
        return sum(sum(f[i] for i in group) / len(group) * sum(P[i] for i in group) for group in groups)
    sent = [G / (M * T) * sum(any(i in group for i in chosen) for _, _, chosen in tokens) for group in groups]
    return sum(sent[d] * sum(P[i] for i in groups[d]) for d in range(G))  # V2 eq. 29-31


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("lengths", [[5, 5, 5], [7, 1, 4]])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_equal_the_equations(name, lengths, scoring):
    choices = random_choices(lengths, scoring)
    expected = reference(name, choices)
    (expected_grad,) = torch.autograd.grad(expected, choices.logits_BTE, retain_graph=True)
    loss = value(name, choices)
    (grad,) = torch.autograd.grad(loss, choices.logits_BTE)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-14)
    assert grad.abs().max() > 1e-3


def test_the_losses_differ_from_each_other():
    values = [value(name, random_choices([7, 1, 4])).item() for name in NAMES]
    gaps = [abs(a - b) for i, a in enumerate(values) for b in values[:i]]
    assert min(gaps) > 1e-3, dict(zip(NAMES, values, strict=True))
    softmax = random_choices([7, 1, 4], "softmax")  # whose affinities sum to 1 already
    torch.testing.assert_close(value("expert", softmax), value("sequence", softmax))
    torch.testing.assert_close(value("switch", softmax), value("batch", softmax))


@pytest.mark.parametrize("lengths", [[6, 6, 6, 6], [7, 1, 4, 5]])
@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_and_ranks_add_up_to_the_whole_batch(name, parts, lengths):
    choices = random_choices(lengths)
    whole = value(name, choices)
    (expected,) = torch.autograd.grad(whole, choices.logits_BTE, retain_graph=True)
    size, counts_E = 4 // parts, counts(choices)
    losses = [value(name, rows(choices, slice(b, b + size)), counts_E) for b in range(0, 4, size)]
    total = sum(losses) if name in WHOLE_BATCH else sum(losses) / parts
    (grad,) = torch.autograd.grad(total, choices.logits_BTE)
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(grad, expected)


def test_over_the_batch_and_over_each_sequence_are_different_losses():
    # V3 §4.5.3: these sequences prefer opposite experts, which only the sequence-wise loss minds.
    choices = random_choices([6, 6])
    flipped = Choices(choices.logits_BTE.flip(-1), choices.scores_BTE.flip(-1), 5 - choices.experts_BTK, *choices[3:])
    both = Choices(*(torch.cat(pair) for pair in zip(choices[:4], flipped[:4], strict=True)), G, M)
    assert value("sequence", both) > value("batch", both) + 0.05
    assert value("batch", both).item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "z"])
def test_one_in_perfect_balance_and_more_when_collapsed(name):
    logits_BTE, mask_BT = torch.zeros(2, 6, E), torch.ones(2, 6, dtype=torch.bool)
    in_turn_BTK = torch.tensor([[0, 2], [4, 1], [3, 5]] * 2).expand(2, -1, -1)
    even = Choices(logits_BTE, logits_BTE.softmax(-1), in_turn_BTK, mask_BT, G, M)
    assert value(name, even).item() == pytest.approx(1, rel=1e-6)
    skewed = torch.tensor([9.0, 9, 0, 0, 0, 0]).expand(2, 6, E)
    one_group = Choices(skewed, skewed.softmax(-1), torch.tensor([0, 1]).expand(2, 6, 2), mask_BT, G, 1)
    assert value(name, one_group).item() == pytest.approx(3, rel=1e-3)  # E/K, and G/M


def test_affinities_of_overloaded_experts_are_pushed_down():
    for name in ("sequence", "batch", "expert", "switch"):
        choices = random_choices([8], "softmax")  # of sigmoids, `expert` pushes all down, the loaded ones harder
        loads, (grad,) = counts(choices), torch.autograd.grad(value(name, choices), choices.logits_BTE)
        pushed = grad.sum((0, 1))
        assert pushed[loads.argmax()] > 0 > pushed[loads.argmin()], name


def test_padding_counts_for_nothing_and_nothing_but_padding_is_zero():
    for name in NAMES:
        choices = random_choices([4, 9])
        (grad,) = torch.autograd.grad(value(name, choices), choices.logits_BTE, retain_graph=True)
        assert grad[0, 4:].abs().sum() == 0 and grad[0, :4].abs().sum() > 0, name
        empty = choices._replace(mask_BT=torch.zeros_like(choices.mask_BT))
        loss = value(name, empty)
        (grad,) = torch.autograd.grad(loss, choices.logits_BTE)
        assert loss == 0 and grad.abs().sum() == 0, name


def test_fp32_under_autocast():
    choices = random_choices([50, 50])
    choices = Choices(choices.logits_BTE.detach().float(), choices.scores_BTE.detach().float(), *choices[2:])
    plain = balance_terms(NAMES, choices)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = balance_terms(NAMES, choices)
    for name in NAMES:
        assert plain[name].dtype == torch.float32 and torch.equal(plain[name], mixed[name])
        assert math.isfinite(plain[name].sum())


@pytest.mark.parametrize("extra", [{"new": None}, {}])
def test_a_loss_without_a_function_and_a_function_without_a_loss_are_errors(extra):
    functions = dict.fromkeys(NAMES) | extra
    table = NAMES if extra else (*NAMES, "new")
    with pytest.raises(AssertionError, match="new"):
        check_complete(functions, table)
    check_complete(NAMES, NAMES)


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_recomputation_changes_no_loss_and_no_gradient(policy):
    config = small_config(num_nextn_predict_layers=1)
    gradients = {}
    for name in ("none", policy):
        model = small_model(config, activation_checkpointing=name, balance=NAMES)
        losses = model.losses(*clear_batch(model))
        assert {name: tuple(term.shape) for name, term in losses.balance.items()} == {
            name: (3, 8) if name in WHOLE_BATCH else (3,) for name in NAMES
        }
        weight_LE = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
        sum((weight_LE * term).sum() if term.dim() == 2 else term.sum() for term in losses.balance.values()).backward()
        gradients[name] = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients["none"]) > 10 and all(map(torch.equal, gradients["none"], gradients[policy]))
