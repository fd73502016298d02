"""The split of a model's layers into the chunks of a pipeline, by planned cost.

The embedding is in the first chunk; the final norm, the heads and the MTP modules are in the last one. An MTP module
has a whole block, so the last chunk of a model with MTP may have no layer of the main model. Every other chunk has one.
"""

from collections.abc import Sequence
from typing import NamedTuple

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.planning.flops import forward_flop_per_token
from dsv3_lightning.planning.parameters import attention_weights, moe_parts, swiglu


class Costs(NamedTuple):
    """Costs in any unit. layers: of each layer of the main model. last: of what the last chunk has besides layers."""

    layers: list[float]
    last: float


def layer_costs(model: ModelConfig, sequence_length: int) -> Costs:
    """FLOP per token of the forward pass; the embedding is a look-up and costs none."""
    scores = model.num_attention_heads * (model.qk_head_dim + model.v_head_dim) * sequence_length
    attention = 2 * attention_weights(model) + scores
    dense = attention + 2 * swiglu(model.hidden_size, model.intermediate_size)
    moe = attention + 2 * sum(part.active for part in moe_parts(model).values())
    first = model.first_k_dense_replace
    layers = [float(dense if i < first else moe) for i in range(model.num_hidden_layers)]
    return Costs(layers, forward_flop_per_token(model, sequence_length) - sum(layers))


def check_layers(layers: Sequence[int], model: ModelConfig, chunks: int) -> None:
    """Raises ConfigError unless `layers` gives each of the chunks its number of layers, as strategy.stages does."""
    name = f"strategy.stages={list(layers)}"
    if len(layers) != chunks:
        raise ConfigError(f"{name}: has {len(layers)} chunks; must have {chunks}")
    if sum(layers) != model.num_hidden_layers:
        raise ConfigError(
            f"{name}: has {sum(layers)} layers; must have model.num_hidden_layers={model.num_hidden_layers}"
        )
    for chunk, (count, least) in enumerate(zip(layers, least_layers(model, chunks), strict=True)):
        if count < least:
            raise ConfigError(f"{name}: chunk {chunk} has no layer; must have at least 1")


def least_layers(model: ModelConfig, chunks: int) -> list[int]:
    """The least number of layers of each chunk."""
    return [1] * (chunks - 1) + [0 if model.mtp_depth and chunks > 1 else 1]


def split_layers(costs: Costs, placement: Sequence[Sequence[int]], least: Sequence[int]) -> list[int]:
    """The number of consecutive layers of each chunk, so that the costliest rank costs as little as it can.

    placement: the chunks of each rank. Among splits with equal ranks the costliest chunk decides. Costs are compared to
    a tenth of a layer, since they are plans. Raises ConfigError if there are fewer layers than the chunks need.

    From the least layers on, each layer goes to the chunk of the cheapest rank; then layers move from chunk to chunk
    until no move helps. With equal layers that is the optimum.

    >>> split_layers(Costs([1.0] * 8, 1.5), [[0, 3], [1, 2]], [1, 1, 1, 1])
    [2, 3, 2, 1]
    """
    count, sizes = len(costs.layers), list(least)
    if count < sum(sizes):
        raise ConfigError(
            f"model.num_hidden_layers={count}: {len(sizes)} chunks of a pipeline need at least {sum(sizes)}, "
            f"so that none is without a layer"
        )
    rank_of = {chunk: rank for rank, chunks in enumerate(placement) for chunk in chunks}

    def worth(sizes: list[int]) -> list[list[float]]:
        chunks = chunk_costs(costs, sizes)
        ranks = [sum(chunks[i] for i in mine) for mine in placement]
        return [[round(cost / mean, 1) for cost in sorted(each, reverse=True)] for each in (ranks, chunks)]

    mean = sum(costs.layers) / count
    for _ in range(count - sum(sizes)):
        chunks = [mean * size for size in sizes]
        chunks[-1] += costs.last
        ranks = [sum(chunks[i] for i in mine) for mine in placement]
        cheapest = min(range(len(sizes)), key=lambda i: (ranks[rank_of[i]], chunks[i]))
        sizes[cheapest] += 1
    best = worth(sizes)
    while True:
        moved = [move(sizes, i, j) for i in range(len(sizes)) for j in range(len(sizes))
                 if i != j and sizes[i] > least[i]]  # fmt: skip
        found = min(moved, key=worth, default=sizes)
        if worth(found) >= best:
            return sizes
        sizes, best = found, worth(found)


def chunk_costs(costs: Costs, sizes: Sequence[int]) -> list[float]:
    """The cost of each chunk of a split."""
    found, start = [], 0
    for size in sizes:
        found.append(sum(costs.layers[start : start + size]))
        start += size
    found[-1] += costs.last
    return found


def move(sizes: list[int], start: int, end: int) -> list[int]:
    """The sizes with one layer fewer in a chunk and one more in another."""
    return [size - (i == start) + (i == end) for i, size in enumerate(sizes)]
