"""The router against loops in fp64 written from V3 eq. 12-16 (arXiv 2412.19437) and V2 §2.2 (arXiv 2405.04434)."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.moe import MoE
from dsv3_lightning.model.permute import sort_by_expert
from dsv3_lightning.model.router import Router, mask_unselected_groups, route

from .small import small_config

V2 = {"scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False}


def reference(scores: list[float], bias: list[float], config: ModelConfig, mistake: str = "") -> dict[int, float]:
    """One token's experts and gates, in Python's fp64; with `mistake`, as a plausible slip would have it."""
    E, G, M, K = config.n_routed_experts, config.n_group, config.topk_group, config.num_experts_per_tok
    choice = [s + b for s, b in zip(scores, bias, strict=True)]  # eq. 16
    group_of = [i // (E // G) for i in range(E)]
    best = 2 if config.topk_method == "noaux_tc" else 1
    if mistake == "group score: the other number of experts":
        best = 3 - best
    values = scores if mistake == "group score without bias" else choice
    group_score = [
        sum(sorted((values[i] for i in range(E) if group_of[i] == g), reverse=True)[:best]) for g in range(G)
    ]
    if mistake == "group score: sum of all":
        group_score = [sum(values[i] for i in range(E) if group_of[i] == g) for g in range(G)]
    open_groups = sorted(range(G), key=lambda g: -group_score[g])[:M]
    if mistake == "groups ignored":
        open_groups = range(G)
    closed = 0.0 if mistake == "mask of 0" else -math.inf
    masked = [choice[i] if group_of[i] in open_groups else closed for i in range(E)]
    if mistake == "choice without bias":
        masked = [scores[i] if group_of[i] in open_groups else closed for i in range(E)]
    chosen = sorted(range(E), key=lambda i: -masked[i])[:K]
    gates = {i: (choice if mistake == "biased gates" else scores)[i] for i in chosen}  # eq. 13: the unbiased ones
    total = sum(scores) if mistake == "normalized over all experts" else sum(gates.values())
    if config.norm_topk_prob != (mistake == "the other normalization"):
        gates = {i: gate / total for i, gate in gates.items()}
    scale = 1.0 if mistake == "not scaled" else config.routed_scaling_factor
    return {i: gate * scale for i, gate in gates.items()}


MISTAKES = [
    "group score: the other number of experts",
    "group score without bias",
    "group score: sum of all",
    "groups ignored",
    "mask of 0",
    "choice without bias",
    "biased gates",
    "normalized over all experts",
    "the other normalization",
    "not scaled",
]


def random_case(seed: int, changes: dict, N: int = 200, bias_mean: float = 0.0, bias_std: float = 0.5):
    """Affinities between 0 and 1 and biases on a grid of 2^-20: fp32 adds them without rounding, and none tie."""
    config = small_config(n_routed_experts=16, num_experts_per_tok=4, **changes)
    generator = torch.Generator().manual_seed(seed)
    logits_NE = torch.randn(N, 16, generator=generator)
    scores_NE = logits_NE.sigmoid() if config.scoring_func == "sigmoid" else (2 * logits_NE).softmax(-1)
    bias_E = torch.randn(16, generator=generator) * bias_std + bias_mean
    grid = 2**20
    return (scores_NE * grid).round().clamp(min=1) / grid, (bias_E * grid).round() / grid, config


CASES = {
    "V3, balanced biases": ({}, 0.0, 0.5),
    "V3, all choices negative": ({}, -3.0, 0.5),
    "V3, biases of either sign far from 0": ({}, -0.5, 2.0),
    "V3, three groups of five open": ({"n_group": 8, "topk_group": 3}, -1.0, 0.3),
    "V3, every group open": ({"topk_group": 4}, -3.0, 0.5),
    "V3, no groups": ({"n_group": 1, "topk_group": 1}, -3.0, 0.5),
    "V3, gates not normalized": ({"norm_topk_prob": False}, -1.0, 0.5),
    "V2, softmax, groups by their best": (V2 | {"routed_scaling_factor": 16.0}, 0.0, 0.0),
    "V2-Lite, softmax, greedy": (V2 | {"topk_method": "greedy", "n_group": 1, "topk_group": 1}, 0.0, 0.0),
    "softmax with biases": (V2 | {"norm_topk_prob": True}, -0.5, 0.2),
}


@pytest.mark.parametrize("name", CASES)
def test_choices_and_gates_equal_the_equations(name):
    changes, mean, std = CASES[name]
    scores_NE, bias_E, config = random_case(1, changes, bias_mean=mean, bias_std=std)
    experts_NK, gates_NK = route(scores_NE, bias_E, config)
    for n, expected in enumerate(references(scores_NE, bias_E, config)):
        got = dict(zip(experts_NK[n].tolist(), gates_NK[n].tolist(), strict=True))
        assert got.keys() == expected.keys()
        assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_gives_another_answer_on_these_inputs(mistake):
    # All choices negative, two of four groups open: no other slip than these hides here either.
    scores_NE, bias_E, config = random_case(1, {}, bias_mean=-3.0)
    right = references(scores_NE, bias_E, config)
    wrong = references(scores_NE, bias_E, config, mistake)
    assert sum(a != pytest.approx(b, rel=1e-3) for a, b in zip(right, wrong, strict=True)) > 10


@given(data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_ties_are_broken_to_a_best_choice(data):
    # Affinities and biases on a coarse grid tie in most tokens. Any of the equals may win, but what is chosen must be
    # the K best of some M groups that no M groups outdo.
    method = data.draw(st.sampled_from(["noaux_tc", "group_limited_greedy"]))
    M, K = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    config = small_config(n_routed_experts=12, n_group=4, topk_group=M, num_experts_per_tok=K, topk_method=method)
    quarters = st.lists(st.integers(1, 4), min_size=12, max_size=12)
    scores = [q / 4 for q in data.draw(quarters)]
    bias = [q / 2 - 2 for q in data.draw(quarters)]
    experts_NK, gates_NK = route(torch.tensor([scores]), torch.tensor(bias), config)

    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    ranked = [sorted(choice[3 * g : 3 * g + 3], reverse=True) for g in range(4)]
    group_score = [sum(best[: 2 if method == "noaux_tc" else 1]) for best in ranked]
    best_scores = sorted(group_score, reverse=True)[:M]
    optima = [
        sorted((c for g in groups for c in ranked[g]), reverse=True)[:K]
        for groups in itertools.combinations(range(4), M)
        if sorted((group_score[g] for g in groups), reverse=True) == best_scores
    ]
    chosen = experts_NK[0].tolist()
    assert len(set(chosen)) == K
    assert len({i // 3 for i in chosen}) <= M
    assert sorted((choice[i] for i in chosen), reverse=True) in optima
    total = sum(scores[i] for i in chosen)
    assert gates_NK[0].tolist() == pytest.approx([2.5 * scores[i] / total for i in chosen])


def test_closed_groups_lose_even_to_negative_choices():  # eq. 13, 16; two groups of two, one open, K = 2
    config = small_config(n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2)
    scores_NE = torch.tensor([[0.9, 0.8, 0.2, 0.1]])
    bias_E = torch.tensor([-1.5, -1.5, -2.0, -2.0])  # choice -0.6 -0.7 | -1.8 -1.9: the first group wins
    experts_NK, gates_NK = route(scores_NE, bias_E, config)
    assert experts_NK.tolist() == [[0, 1]]  # a mask of 0 instead of -inf picks 2 and 3
    torch.testing.assert_close(gates_NK, torch.tensor([[2.5 * 9 / 17, 2.5 * 8 / 17]]))  # biased: 2.5 * 6/13, 7/13
    assert mask_unselected_groups(scores_NE + bias_E, config)[0, 2:].tolist() == [-math.inf, -math.inf]


def test_a_group_counts_its_two_best_biased_choices():  # three groups of three, one open
    config = small_config(n_routed_experts=9, n_group=3, topk_group=1, num_experts_per_tok=2)
    scores_NE = torch.tensor([[0.9, 0.1, 0.1, 0.6, 0.5, 0.1, 0.5, 0.5, 0.5]])
    bias_E = torch.tensor([0.0, 0.0, 0.0, 0.1, 0.1, 0.0, 0.0, 0.0, 0.0])
    # choice   0.9 0.1 0.1 | 0.7 0.6 0.1 | 0.5 0.5 0.5
    # best two     1.0     |     1.3     |     1.0        <- the second group
    # best         0.9     |     0.7     |     0.5        the first (V2's rule)
    # all          1.1     |     1.4     |     1.5        the third
    experts_NK, gates_NK = route(scores_NE, bias_E, config)
    assert experts_NK.tolist() == [[3, 4]]
    torch.testing.assert_close(gates_NK, torch.tensor([[2.5 * 6 / 11, 2.5 * 5 / 11]]))

    bias_E = torch.tensor([0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])  # best two, biased: 1.5 | 1.1 | 1.0
    assert route(scores_NE, bias_E, config)[0].tolist() == [[0, 1]]  # without bias in the group score: 1.0 | 1.1 | 1.0


def test_v2_groups_by_their_best_and_gates_are_the_plain_affinities():  # V2 §2.2.2; two groups of three, one open
    config = small_config(
        n_routed_experts=6, n_group=2, topk_group=1, num_experts_per_tok=2, routed_scaling_factor=16.0, **V2
    )
    scores_NE = torch.tensor([[0.3, 0.05, 0.02, 0.22, 0.21, 0.2]])  # best 0.3 | 0.22; best two 0.35 | 0.43
    experts_NK, gates_NK = route(scores_NE, torch.zeros(6), config)
    assert experts_NK.tolist() == [[0, 1]]
    torch.testing.assert_close(gates_NK, torch.tensor([[16 * 0.3, 16 * 0.05]]))  # normalized: 16 * 6/7, 1/7


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
def test_affinities_equal_fp64(scoring_func):  # eq. 15; V2: softmax over all experts, not over the chosen
    router, x_ND = random_router(small_config(scoring_func=scoring_func))
    logits = (x_ND.double() @ router.weight.double().T).tolist()
    for row, scores in zip(logits, router(x_ND).scores_NE.tolist(), strict=True):
        exponentials = [math.exp(logit) for logit in row]
        if scoring_func == "sigmoid":
            expected = [1 / (1 + math.exp(-logit)) for logit in row]
        else:
            expected = [e / sum(exponentials) for e in exponentials]
        assert scores == pytest.approx(expected, rel=1e-5)


def test_affinities_are_fp32_whatever_the_model_is():
    # bf16 affinities would be off by 2^-9: enough to reorder experts that differ by less.
    router, x_ND = random_router(small_config())
    plain = router(x_ND)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = router(x_ND)
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))

    x_ND = x_ND.bfloat16()
    exact = (x_ND.double() @ router.weight.double().T).sigmoid()
    routing = router(x_ND)
    assert routing.scores_NE.dtype == routing.gates_NK.dtype == torch.float32
    torch.testing.assert_close(routing.scores_NE.double(), exact, rtol=1e-5, atol=0)

    router.weight.data = router.weight.data.bfloat16()  # the products and the sigmoid are fp32 all the same
    exact = (x_ND.double() @ router.weight.double().T).sigmoid()
    torch.testing.assert_close(router(x_ND).scores_NE.double(), exact, rtol=1e-5, atol=0)


def test_gradient_reaches_the_router_through_the_gates_and_the_bias_gets_none():
    router, x_ND = random_router(small_config())
    weights = torch.randn(len(x_ND), 3, generator=torch.Generator().manual_seed(5))
    routing = router(x_ND)
    (routing.gates_NK * weights).sum().backward()

    weight = router.weight.detach().double().requires_grad_()
    scores_NE = (x_ND.double() @ weight.T).sigmoid()
    chosen_NK = scores_NE.gather(1, routing.experts_NK)
    (2.5 * chosen_NK / chosen_NK.sum(1, keepdim=True) * weights).sum().backward()
    torch.testing.assert_close(router.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-6)
    assert not router.expert_bias.requires_grad


def test_a_forward_pass_leaves_the_bias_alone():
    router, x_ND = random_router(small_config())
    before = router.expert_bias.clone()
    router.train()(x_ND)
    assert torch.equal(router.expert_bias, before)


@pytest.mark.slow
def test_counts_are_exact_beyond_what_fp32_can_count():
    # fp32 stops at 2^24 = 16,777,216 when ones are added; its neighbors above are even numbers.
    N = 2**24 + 3
    counts_E = sort_by_expert(torch.ones(1, 1, dtype=torch.int64).expand(N, 1), 3).counts_E
    assert counts_E.dtype == torch.int64
    assert counts_E.tolist() == [0, N, 0]


def test_padding_is_not_counted():
    assert sort_by_expert(torch.tensor([[0, 2], [-1, -1], [2, 3], [-1, -1]]), 5).counts_E.tolist() == [1, 0, 2, 1, 0]

    moe = MoE(small_config())
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    x_BTD = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    mask_BT = torch.tensor([[True] * 7, [True] * 3 + [False] * 4])
    counts_E = moe(x_BTD, mask_BT)[1].counts_E
    real_ND = x_BTD[mask_BT]
    experts = moe.gate(real_ND).experts_NK.flatten().tolist()
    assert counts_E.tolist() == [experts.count(e) for e in range(8)]
    assert counts_E.sum() == 10 * 3


def references(scores_NE, bias_E, config, mistake: str = "") -> list[dict[int, float]]:
    return [reference(scores, bias_E.tolist(), config, mistake) for scores in scores_NE.tolist()]


def random_router(config: ModelConfig) -> tuple[Router, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    router = Router(config)
    with torch.no_grad():
        router.weight.normal_(std=0.3, generator=generator)
        router.expert_bias.normal_(mean=-1.0, std=0.3, generator=generator)
    return router, torch.randn(50, config.hidden_size, generator=generator)


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("groups, open_groups", [(1, 1), (4, 2)])
def test_a_multiplicative_bias_scales_the_choice_and_not_the_gates(scoring, groups, open_groups):
    """s · (1 + b): an expert of small affinity is lifted less than by adding b; worked out in fp64, token by token."""
    config = small_config(
        expert_bias_kind="multiplicative", scoring_func=scoring, n_group=groups, topk_group=open_groups
    )
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(200, 8, generator=generator)
    scores = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)
    bias = torch.tensor([0.9, -0.9, 0.5, 0.0, -0.5, 0.3, 0.0, -0.2])
    experts, gates = route(scores, bias, config)
    for s, chosen, gate in zip(scores.double(), experts.tolist(), gates.double()):
        choice = s * (1 + bias.double())
        best = [sorted(choice[g * 8 // groups : (g + 1) * 8 // groups].tolist())[-2:] for g in range(groups)]
        allowed = sorted(range(groups), key=lambda g: -sum(best[g]))[:open_groups]
        ranked = sorted((i for i in range(8) if i // (8 // groups) in allowed), key=lambda i: -choice[i].item())
        assert chosen == ranked[:3]
        torch.testing.assert_close(gate, 2.5 * s[chosen] / s[chosen].sum(), rtol=1e-6, atol=0)
    added, _ = route(scores, bias, small_config(scoring_func=scoring, n_group=groups, topk_group=open_groups))
    assert (added.sort().values != experts.sort().values).any()
