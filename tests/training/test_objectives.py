"""DPO and GRPO by token weights: against autograd through the papers' equations in fp64, and against TRL's numbers."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dsv3_lightning.model.head import OutputHead
from dsv3_lightning.model.losses import IGNORE, linear_cross_entropy
from dsv3_lightning.training.objectives import advantages, dpo, grpo, token_factors, without_contrast
from tests.model.small import small_batch, small_config, small_model

B, T, D, V = 6, 7, 5, 23
TRL = json.loads((Path(__file__).parent / "trl_numbers.json").read_text())


def tensors(seed: int = 0):
    """Hidden states, a head, targets with answers of different lengths (one of a single token), fp64."""
    generator = torch.Generator().manual_seed(seed)
    h_BTD = torch.randn(B, T, D, generator=generator, dtype=torch.float64).requires_grad_()
    head = OutputHead(D, V, bias=False).double()
    head.weight.data = torch.randn(V, D, generator=generator, dtype=torch.float64)
    targets_BT = torch.randint(V, (B, T), generator=generator)
    for row, (begin, end) in enumerate([(2, 7), (1, 2), (3, 6), (0, 7), (2, 4), (4, 7)]):
        targets_BT[row, :begin] = IGNORE
        targets_BT[row, end:] = IGNORE
    near_BT = [0.3 * torch.randn(B, T, generator=generator, dtype=torch.float64) for _ in range(2)]
    return h_BTD, head, targets_BT, near_BT


def log_pi(h_BTD, weight, targets_BT):
    """log π of every target by autograd's own operations, 0 where there is none."""
    log_p = F.log_softmax(h_BTD @ weight.T, -1).gather(2, targets_BT.clamp(min=0)[..., None]).squeeze(2)
    return log_p * (targets_BT != IGNORE)


def assert_gradients_are_those_of(reference, h_BTD, head, targets_BT, weigh):
    """The fused loss with the weights of `weigh` has the gradients of `reference`, a scalar from log π."""
    expected = torch.autograd.grad(reference(log_pi(h_BTD, head.weight, targets_BT)), (h_BTD, head.weight))
    loss = head.loss([h_BTD], targets_BT[:, None], weigh)[0]
    found = torch.autograd.grad(loss, (h_BTD, head.weight))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * float(b.abs().max()))
    assert float(expected[0].abs().max()) > 0


def test_supervised_tuning_is_the_weight_one_over_the_number_of_tokens():
    h_BTD, head, targets_BT, _ = tensors()
    count = int((targets_BT != IGNORE).sum())
    weighted = head.loss([h_BTD], targets_BT[:, None], lambda log_p, entropy: torch.full_like(log_p, 1 / count))[0]
    plain = linear_cross_entropy(h_BTD.flatten(0, 1), head.weight, targets_BT.flatten()) / count
    torch.testing.assert_close(weighted, plain, rtol=1e-14, atol=0)
    for a, b in zip(*(torch.autograd.grad(loss, (h_BTD, head.weight)) for loss in (weighted, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-15)


def test_log_probabilities_and_entropies_are_those_of_the_distribution():
    h_BTD, head, targets_BT, _ = tensors()
    for chunks in (None, (4, 3)):
        head.chunks = chunks
        log_p_N, entropy_N = head.log_probabilities(h_BTD.flatten(0, 1), targets_BT.flatten())
        torch.testing.assert_close(log_p_N.view(B, T), log_pi(h_BTD, head.weight, targets_BT).detach())
        distribution = torch.distributions.Categorical(logits=h_BTD @ head.weight.T)
        torch.testing.assert_close(entropy_N.view(B, T), distribution.entropy().detach())
        assert not log_p_N.requires_grad


def test_the_temperature_divides_the_logits_of_the_main_head_alone():
    h_BTD, head, targets_BT, _ = tensors()
    head.temperature = 0.7
    seen = []
    targets_BPT = torch.stack((targets_BT, targets_BT), 1)
    losses = head.loss([h_BTD, h_BTD], targets_BPT, lambda log_p, entropy: seen.append(log_p) or torch.ones_like(log_p))
    torch.testing.assert_close(seen[0], log_pi(h_BTD / 0.7, head.weight, targets_BT).detach())
    torch.testing.assert_close(losses[1], -log_pi(h_BTD, head.weight, targets_BT).sum())
    (by_mtp,) = torch.autograd.grad(losses[1], head.weight)
    assert by_mtp.abs().max() == 0  # the head learns from the main model's tokens alone


def test_with_weights_the_mtp_modules_learn_and_change_nothing_in_the_main_model():
    """MTP's loss in the trunk changes what reinforcement learning optimizes (verl's finding)."""
    config = small_config(num_nextn_predict_layers=1)
    model, (tokens, mask, targets) = small_model(config), small_batch(config)
    losses = model.losses(tokens, mask, targets, weigh=lambda log_p, entropy: torch.ones_like(log_p))
    torch.testing.assert_close(losses.nll_P, model.losses(tokens, mask, targets).nll_P)
    losses.nll_P[1:].sum().backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert {name for name in learned if not name.startswith("mtp.")} == set()
    assert {"mtp.0.eh_proj.weight", "mtp.0.hnorm.weight", "mtp.0.norm.weight"} <= learned


@pytest.mark.parametrize("by_length", [False, True])
def test_dpo_has_the_value_and_the_gradient_of_its_equation(by_length):
    h_BTD, head, targets_BT, (apart_BT, _) = tensors()
    valid = targets_BT != IGNORE
    reference_B = ((log_pi(h_BTD, head.weight, targets_BT) + apart_BT) * valid).sum(1).detach()
    beta = 0.7

    def equation(log_p):
        log_p = log_p / valid.sum(1, keepdim=True) if by_length else log_p
        against = reference_B / valid.sum(1) if by_length else reference_B
        chosen, rejected = (log_p.sum(1) - against).chunk(2)
        return -torch.log(1 / (1 + torch.exp(-beta * (chosen - rejected)))).mean()

    outcomes = []

    def weigh(log_p, entropy):
        outcomes.append(dpo(log_p, valid, reference_B, beta, by_length, scale=2 / B))
        return outcomes[-1].weights_BT

    assert_gradients_are_those_of(equation, h_BTD, head, targets_BT, weigh)
    torch.testing.assert_close(outcomes[0].value, equation(log_pi(h_BTD, head.weight, targets_BT)).detach())


def test_dpo_of_the_reference_itself_is_the_logarithm_of_two():
    _, _, targets_BT, (log_p_BT, _) = tensors()
    valid = targets_BT != IGNORE
    outcome = dpo(log_p_BT, valid, (log_p_BT * valid).sum(1), 0.1, False, 2 / B)
    assert float(outcome.value) == pytest.approx(math.log(2), abs=1e-15)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("variant", ["grpo", "dr_grpo", "dapo"])
def test_each_variant_of_grpo_has_the_value_and_the_gradient_of_its_equation(variant, beta):
    h_BTD, head, targets_BT, (near_BT, far_BT) = tensors()
    valid = targets_BT != IGNORE
    now_BT = log_pi(h_BTD, head.weight, targets_BT).detach()
    old_BT, reference_BT = (now_BT + near_BT) * valid, (now_BT + far_BT) * valid
    advantages_B = torch.tensor([1.0, -0.5, 2.0, -2.0, 0.0, -1.0], dtype=torch.float64)
    lengths_B, limit, low, high = valid.sum(1).double(), 9, 0.1, 0.2

    def equation(log_p):
        ratio, apart = torch.exp(log_p - old_BT), reference_BT - log_p
        gain = torch.min(ratio * advantages_B[:, None], ratio.clamp(1 - low, 1 + high) * advantages_B[:, None])
        per_token = (-gain + beta * (torch.exp(apart) - apart - 1)) * valid
        if variant == "grpo":
            return (per_token.sum(1) / lengths_B).mean()
        return per_token.sum() / (lengths_B.sum() if variant == "dapo" else B * limit)

    factors_B = token_factors(lengths_B, variant, B, float(lengths_B.sum()), limit)
    outcomes = []

    def weigh(log_p, entropy):
        outcomes.append(
            grpo(log_p, old_BT, reference_BT if beta else None, valid, advantages_B, factors_B, (low, high), beta)
        )
        return outcomes[-1].weights_BT

    assert_gradients_are_those_of(equation, h_BTD, head, targets_BT, weigh)
    torch.testing.assert_close(outcomes[0].value, equation(now_BT))
    assert min(outcomes[0].facts[f"clipped_{side}"] for side in ("low", "high")) > 0  # both limits were met


def test_on_policy_the_loss_is_zero_and_its_gradient_is_not():
    h_BTD, head, targets_BT, _ = tensors()
    valid = targets_BT != IGNORE
    advantages_B = torch.tensor([1.0, -1.0, 0.5, -0.5, 1.0, -1.0], dtype=torch.float64)
    factors_B = token_factors(valid.sum(1).double(), "grpo", B, 1, 1)
    values = []

    def weigh(log_p, entropy):
        outcome = grpo(log_p, log_p, None, valid, advantages_B, factors_B, (0.2, 0.2), 0.0)
        values.append(float(outcome.value))
        return outcome.weights_BT

    (gradient,) = torch.autograd.grad(head.loss([h_BTD], targets_BT[:, None], weigh)[0], h_BTD)
    assert values == [pytest.approx(0, abs=1e-15)]
    assert gradient.abs().max() > 1e-3


@pytest.mark.slow
def test_a_bandit_of_ten_tokens_is_solved():
    """The largest reward is found; with a KL term the optimum is known: π_a ∝ π_ref,a / (β + mean reward - r_a)."""
    rewards_V = torch.linspace(0, 1, 10, dtype=torch.float64)[torch.randperm(10, generator=torch.manual_seed(0))]
    reference_V = (0.5 * torch.randn(10, dtype=torch.float64)).log_softmax(0)
    for beta in (0.0, 0.5):
        head, h = OutputHead(1, 10, bias=False).double(), torch.ones(1, 320, 1, dtype=torch.float64)
        head.weight.data = (reference_V if beta else torch.zeros(10).double())[:, None].clone()
        optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
        for _ in range(500):
            actions = torch.multinomial(head.weight.detach()[:, 0].softmax(0), 320, replacement=True)
            apart = advantages(rewards_V[actions].view(1, 4, 80), torch.ones(1).double(), "none", each=False)
            valid, factors = torch.ones(320, 1, dtype=torch.bool), torch.full((320,), 1 / 320, dtype=torch.float64)

            def weigh(log_p, entropy, actions=actions, apart=apart, valid=valid, factors=factors, beta=beta):
                reference = reference_V[actions][:, None] if beta else None
                outcome = grpo(log_p.T, log_p.T, reference, valid, apart.flatten(), factors, (0.2, 0.2), beta)
                return outcome.weights_BT.T

            optimizer.zero_grad()
            head.loss([h], actions.view(1, 1, 320), weigh).sum().backward()
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.998
        found = head.weight.detach()[:, 0].softmax(0)
        if not beta:
            assert found[rewards_V.argmax()] > 0.95
            continue
        mean = float((found * rewards_V).sum())
        expected = beta * reference_V.exp() / (beta + mean - rewards_V)
        torch.testing.assert_close(found, expected / expected.sum(), rtol=0, atol=0.03)
        assert (found - reference_V.exp()).abs().max() > 0.05


def test_advantages_are_the_distances_from_the_mean_of_the_group():
    rewards = torch.tensor([[[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]]], dtype=torch.float64)
    plain = advantages(rewards, torch.ones(1), "none", each=False)
    assert plain.tolist() == [[0.5, -0.5, -0.5, 0.5], [-0.25, -0.25, -0.25, 0.75], [0, 0, 0, 0]]
    scaled = advantages(rewards, torch.ones(1), "group", each=False)
    torch.testing.assert_close(scaled[1], plain[1] / (rewards[0, 1].std() + 1e-4))
    assert without_contrast(scaled).tolist() == [False, False, True]


def test_a_function_that_does_not_apply_counts_in_no_mean():
    none = math.nan
    rewards = torch.tensor([[[1.0, none, 0.0, none]], [[none, 1.0, 1.0, none]]])
    found = advantages(rewards, torch.tensor([1.0, 2.0]), "none", each=False)  # sums 1, 2, 2, and nothing
    torch.testing.assert_close(found[0, :3], torch.tensor([-2 / 3, 1 / 3, 1 / 3]))
    assert found[0, 3].isnan()
    one = torch.tensor([[[none, 3.0, none, none]]])
    assert advantages(one, torch.ones(1), "group", each=False).nan_to_num().tolist() == [[0, 0, 0, 0]]


def test_rewards_that_are_normalized_before_the_sum_do_not_hide_one_another():
    """Summed first, (0, 1) and (1, 0) of two rewards are the same total (arXiv 2601.05242)."""
    rewards = torch.tensor([[[0.0, 1.0, 1.0, 0.0]], [[0.0, 100.0, 0.0, 100.0]]], dtype=torch.float64)
    weights = torch.ones(2, dtype=torch.float64)
    summed = advantages(rewards, weights, "group", each=False)[0]
    normalized = advantages(rewards, weights, "group", each=True)[0]
    assert summed[3] > summed[2] + 1  # the second function's numbers are 100 times those of the first
    torch.testing.assert_close(normalized[2], normalized[3], rtol=0, atol=1e-3)
    torch.testing.assert_close(normalized[0] + normalized[1], torch.tensor(0.0, dtype=torch.float64))


@pytest.mark.parametrize("case", TRL["grpo"], ids=lambda case: f"{case['variant']}-{case['beta']}")
def test_grpo_has_the_loss_and_the_gradient_of_trl_on_the_same_tensors(case):
    inputs = {name: torch.tensor(TRL["inputs"][name], dtype=torch.float64) for name in TRL["inputs"]}
    valid = inputs["mask"].bool()
    lengths = valid.sum(1).double()
    factors = token_factors(lengths, case["variant"], len(lengths), float(lengths.sum()), case["limit"])
    outcome = grpo(
        inputs["log_p"], inputs["old"], inputs["reference"] if case["beta"] else None, valid, inputs["advantages"],
        factors, (case["low"], case["high"]), case["beta"],
    )  # fmt: skip
    assert float(outcome.value) == pytest.approx(case["loss"], rel=1e-9)
    torch.testing.assert_close(
        -outcome.weights_BT, torch.tensor(case["gradient"], dtype=torch.float64), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("case", TRL["dpo"], ids=lambda case: case["loss_type"])
def test_dpo_has_the_loss_and_the_gradient_of_trl_on_the_same_tensors(case):
    inputs = {name: torch.tensor(TRL["inputs"][name], dtype=torch.float64) for name in TRL["inputs"]}
    valid = inputs["mask"].bool()
    reference_B = (inputs["reference"] * valid).sum(1)
    by_length = case["loss_type"] == "sigmoid_norm"
    outcome = dpo(inputs["log_p"], valid, reference_B, case["beta"], by_length, 2 / len(valid))
    assert float(outcome.value) == pytest.approx(case["loss"], rel=1e-9)
    torch.testing.assert_close(
        -outcome.weights_BT, torch.tensor(case["gradient"], dtype=torch.float64), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("case", TRL["advantages"], ids=lambda case: case["scale"])
def test_advantages_are_those_of_trl_on_the_same_rewards(case):
    rewards = torch.tensor([[math.nan if r is None else r for r in row] for row in case["rewards"]]).double()
    weights = torch.tensor(case["weights"]).double()
    found = advantages(rewards.view(len(weights), -1, case["group"]), weights, case["scale"], each=False)
    expected = torch.tensor(case["advantages"]).double()
    torch.testing.assert_close(found.flatten().nan_to_num(), expected, rtol=1e-5, atol=1e-6)  # TRL's are fp32
