"""The split of layers into chunks, against the best of all splits."""

import itertools
import random
from dataclasses import replace

import pytest

from dsv3_lightning.common.schedules import SCHEDULES, placement
from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.planning.flops import forward_flop_per_token
from dsv3_lightning.planning.pipeline.split import (
    Costs,
    check_layers,
    chunk_costs,
    layer_costs,
    least_layers,
    split_layers,
)

V3 = check(compose(["v3"]).tree).model
DENSE = check(compose(["llm-7b"]).tree).model
V_OF_2, V_OF_3 = [[0, 3], [1, 2]], [[0, 5], [1, 4], [2, 3]]


def best(costs: Costs, of_ranks: list[list[int]], least: list[int]) -> float:
    """The cost of the costliest rank in the best of all splits, tried one by one."""
    chunks, count = len(least), len(costs.layers)
    found = []
    for cuts in itertools.combinations_with_replacement(range(count + 1), chunks - 1):
        sizes = [b - a for a, b in itertools.pairwise((0, *cuts, count))]
        if all(size >= low for size, low in zip(sizes, least, strict=True)):
            each = chunk_costs(costs, sizes)
            found.append(max(sum(each[i] for i in mine) for mine in of_ranks))
    return min(found)


@pytest.mark.parametrize("of_ranks", [V_OF_2, V_OF_3, [[0], [1], [2]], [[0, 2], [1, 3]]])
@pytest.mark.parametrize("last", [0.0, 0.4, 2.7])
def test_equal_layers_are_split_as_well_as_can_be(of_ranks: list[list[int]], last: float):
    chunks = sum(map(len, of_ranks))
    for count in range(chunks, 12):
        costs, least = Costs([1.0] * count, last), [1] * chunks
        each = chunk_costs(costs, split_layers(costs, of_ranks, least))
        assert max(sum(each[i] for i in mine) for mine in of_ranks) == pytest.approx(best(costs, of_ranks, least))


def test_unequal_layers_are_split_nearly_as_well():
    numbers = random.Random(0)
    for _ in range(40):
        costs = Costs([numbers.uniform(0.5, 2) for _ in range(9)], numbers.uniform(0, 3))
        sizes = split_layers(costs, V_OF_2, [1, 1, 1, 0])
        assert sum(sizes) == 9 and min(sizes[:3]) >= 1
        each = chunk_costs(costs, sizes)
        assert max(each[0] + each[3], each[1] + each[2]) <= 1.1 * best(costs, V_OF_2, [1, 1, 1, 0])


@pytest.mark.parametrize("model", [V3, replace(V3, num_nextn_predict_layers=2), DENSE])
def test_layer_costs_are_the_flop_of_the_forward_pass(model):
    costs = layer_costs(model, 4096)
    assert len(costs.layers) == model.num_hidden_layers
    assert sum(costs.layers) + costs.last == forward_flop_per_token(model, 4096)
    # by hand: of V3 a layer 2 · (187.1M + 9 · 3 · 7,168 · 2,048) and scores, the last chunk also two heads
    if model is V3:
        assert costs.layers[10] == pytest.approx(2 * (187.1e6 + 396.4e6 + 1.8e6) + 128 * 320 * 4096, rel=1e-3)
        assert costs.last == pytest.approx(costs.layers[10] + 4 * 7168 * 129280 + 2 * 2 * 7168**2, rel=1e-3)


def test_v3_in_sixteen_ranks_has_two_layers_per_chunk_and_its_ends_on_one_rank():
    """As Megatron's recipes have it, but for the embedding's chunk: a V puts embedding, MTP and heads on one rank."""
    of_ranks = placement(SCHEDULES["dualpipev"], 16)
    sizes = split_layers(layer_costs(V3, 4096), of_ranks, least_layers(V3, 32))
    assert sizes == [1, *[2] * 30, 0]
    check_layers(sizes, V3, 32)


def test_the_last_chunk_needs_a_layer_unless_it_has_an_mtp_module():
    assert least_layers(V3, 4) == [1, 1, 1, 0]
    assert least_layers(DENSE, 4) == [1, 1, 1, 1]


def test_too_few_layers_for_the_chunks_are_refused():
    small = replace(V3, num_hidden_layers=6, first_k_dense_replace=1)
    with pytest.raises(ConfigError, match=r"^model.num_hidden_layers=6: 8 chunks of a pipeline need at least 7, "):
        split_layers(layer_costs(small, 128), placement(SCHEDULES["zbv"], 4), least_layers(small, 8))


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        ([20, 20, 21], r"has 3 chunks; must have 4"),
        ([20, 20, 20, 0], r"has 60 layers; must have model.num_hidden_layers=61"),
        ([20, 0, 20, 21], r"chunk 1 has no layer; must have at least 1"),
    ],
)
def test_a_split_by_hand_that_is_no_split_is_refused(layers: list[int], problem: str):
    with pytest.raises(ConfigError, match=rf"^strategy.stages=\[.*\]: {problem}$"):
        check_layers(layers, V3, 4)
