"""Router statistics against plain Python, token by token."""

import math

import pytest
import torch

from dsv3_lightning.model.router import Routing
from dsv3_lightning.training.metrics import Acceptance
from dsv3_lightning.training.router_metrics import (
    ChoiceStatistics,
    load_statistics,
    relative_coactivation,
    specialization,
)
from tests.model.small import small_config


def test_load_statistics_by_hand():
    counts = torch.tensor([[6, 1, 1, 0], [2, 2, 2, 2], [0, 0, 0, 0]])
    values = load_statistics(counts, 2)
    assert values["load_max"].tolist() == [3.0, 1.0, 0.0]
    assert values["load_min"].tolist() == [0.0, 1.0, 0.0]
    assert values["load_p50"].tolist() == [0.5, 1.0, 0.0]
    assert values["dead_experts"].tolist() == [0.25, 0.0, 1.0]
    assert values["group_load_max"].tolist() == [7 / 8 * 2, 1.0, 0.0]
    assert values["load_cv"].tolist() == pytest.approx([math.sqrt((16 + 1 + 1 + 4) / 4) / 2, 0.0, 0.0])
    entropy = -(0.75 * math.log(0.75) + 2 * 0.125 * math.log(0.125)) / math.log(4)
    assert values["load_entropy"].tolist() == pytest.approx([entropy, 1.0, 0.0])


@pytest.mark.parametrize("kind", ["additive", "multiplicative"])
def test_choice_statistics_count_each_token_that_is_no_padding_once(kind):
    config = small_config(num_nextn_predict_layers=1, expert_bias_kind=kind)  # 8 experts in 4 groups, 2 open, K = 3
    generator, metric = torch.Generator().manual_seed(0), ChoiceStatistics(config, origins=3)
    bias = torch.randn(8, generator=generator) / 4
    margins, groups, tokens = [], [], 0
    together = [[0] * 8 for _ in range(8)]
    by_origin = [[0] * 8 for _ in range(3)]
    from dsv3_lightning.model.router import route

    for _ in range(2):  # two batches of one set
        scores = torch.randn(30, 8, generator=generator).sigmoid()
        mask = torch.rand(30, generator=generator) < 0.7
        experts, gates = route(scores, bias, config)
        origins = torch.randint(3, (30,), generator=generator)
        metric.update(1, Routing(experts, gates, scores, scores.logit()), bias, mask, origins)
        for s, chosen, real, origin in zip(scores, experts.tolist(), mask.tolist(), origins.tolist()):
            if not real:
                continue
            tokens += 1
            choice = s + bias if kind == "additive" else s * (1 + bias)
            score = choice.view(4, 2).sum(1)
            opened = score.argsort(descending=True)[:2].tolist()
            ranked = sorted((choice[i].item() for i in range(8) if i // 2 in opened), reverse=True)
            margins.append(ranked[2] - ranked[3])
            groups.append(len({i // 2 for i in chosen}))
            for i in chosen:
                by_origin[origin][i] += 1
                for j in chosen:
                    together[i][j] += 1
    margin_by_layer, groups_by_layer, together_LEE, counts_LOE = metric.compute()
    assert margin_by_layer == [None, pytest.approx(sum(margins) / tokens, rel=1e-5), None]
    assert groups_by_layer == [None, pytest.approx(sum(groups) / tokens), None]
    assert together_LEE[1].tolist() == together and counts_LOE[1].tolist() == by_origin
    assert together_LEE[0].sum() == together_LEE[2].sum() == 0 and together_LEE.shape == (3, 8, 8)


def test_a_margin_where_nothing_is_left_out_is_absent():
    config = small_config(n_group=4, topk_group=1, num_experts_per_tok=2)  # both experts of the one open group
    metric, scores = ChoiceStatistics(config), torch.rand(5, 8)
    metric.update(
        0, Routing(torch.tensor([[0, 1]] * 5), scores[:, :2], scores, scores), torch.zeros(8), torch.ones(5) > 0
    )
    assert metric.compute()[:2] == ([None, None], [1.0, None])


def test_coactivation_is_one_by_chance_and_shows_pairs():
    independent = torch.tensor([[60, 30, 10], [30, 50, 20], [10, 20, 30]])
    pair = torch.tensor([[50, 50, 0, 0], [50, 50, 0, 0], [0, 0, 50, 50], [0, 0, 50, 50]])  # 100 tokens, K = 2
    relative = relative_coactivation(torch.stack([pair]))[0]
    assert relative.tolist() == [[1, 2, 0, 0], [2, 1, 0, 0], [0, 0, 1, 2], [0, 0, 2, 1]]
    tokens = 140**2 / 260
    assert relative_coactivation(independent)[0, 1].item() == pytest.approx(30 * tokens / (60 * 50))


def test_specialization_is_the_share_of_choices_that_the_origin_explains():
    # 30 and 10 choices; of all, the experts have 0.5, 0.25, 0.25
    counts = torch.tensor([[20, 5, 5], [0, 5, 5]])
    first, second = (1 / 6 + 1 / 12 + 1 / 12) / 2, (1 / 2 + 1 / 4 + 1 / 4) / 2
    assert specialization(counts).item() == pytest.approx(0.75 * first + 0.25 * second)
    alike, own, unseen = [[8, 4], [2, 1]], [[9, 0], [0, 9]], [[0, 0], [0, 0]]
    assert specialization(torch.tensor([alike, own, unseen])).tolist() == pytest.approx([0.0, 0.5, 0.0])


def test_acceptance_is_of_chains_and_at_the_main_models_own_place():
    T, ignored = 5, -100
    guesses = torch.tensor([[[1, 2, 3, 4, 5], [2, 9, 4, 5, 9], [3, 4, 5, 9, 9]]])
    targets = torch.zeros(1, 3, T, dtype=torch.int64)
    metric = Acceptance(2)
    metric.update(guesses, targets)
    # depth 1: places 0-3 against the main head's 1-4: 2=2, 9≠3, 4=4, 5=5. depth 2: 0-2 against 2-4: 3=3, (4=4 but its
    # chain broke), 5=5
    assert metric.compute() == [3 / 4, 2 / 3]
    targets[0, 1, 0] = ignored  # no such token: a document's end
    targets[0, 0, 4] = ignored
    metric.update(guesses, targets)
    # depth 1: places 1 and 2 are left. Depth 2 guesses where depth 1 does: place 0 drafts nothing, 1's chain breaks,
    # and place 2 has no token of the main head's to be compared with
    assert metric.accepted.tolist() == [3 + 1, 2 + 0] and metric.drafted.tolist() == [4 + 2, 3 + 1]


def test_acceptance_counts_no_place_whose_shallower_draft_has_no_target():
    """Each module guesses what the main model chooses wherever both have a target: decoding would keep everything."""
    generator, T, depth, ignored = torch.Generator().manual_seed(0), 200, 3, -100
    tokens = torch.randint(1, 50, (4, T + 1 + depth), generator=generator)
    learned = torch.rand(tokens.shape, generator=generator) < 0.7  # answers and questions, mixed
    targets = torch.stack([torch.where(learned, tokens, ignored)[:, k + 1 : k + 1 + T] for k in range(1 + depth)], 1)
    guesses = torch.where(targets == ignored, 0, targets)  # what the model gives where there is no target
    metric = Acceptance(depth)
    metric.update(guesses, targets)
    assert metric.compute() == [1.0, 1.0, 1.0]
    # by hand, place by place: a draft of depth k exists where the tokens 2 … k + 1 places on are learned
    chains = [sum(learned[b, i + 2 : i + 2 + k].all() for b in range(4) for i in range(T - k)) for k in (1, 2, 3)]
    assert metric.drafted.tolist() == chains


def test_what_was_never_routed_has_no_means():
    metric, scores = ChoiceStatistics(small_config(), origins=2), torch.rand(1, 8)
    padding = torch.zeros(1, dtype=torch.bool)
    metric.update(1, Routing(torch.tensor([[0, 1, 2]]), scores[:, :3], scores, scores), torch.zeros(8), padding)
    assert metric.compute()[:2] == ([None, None], [None, None])
    assert "load_entropy" not in load_statistics(torch.tensor([[7]]), 1)  # of one expert it would be 0 / 0
