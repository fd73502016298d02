"""Log-probabilities of given continuations, in batches of similar lengths."""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.model.transformer import Transformer

BATCH_TOKENS = 4096  # tokens of a batch, padding included


class Scored(NamedTuple):
    """A continuation of C tokens. log_p_C: their natural log-probabilities, fp32, on the CPU. greedy_C: bool, whether
    each is the most likely token."""

    log_p_C: Tensor
    greedy_C: Tensor

    @property
    def total(self) -> float:
        """The log-probability of the whole continuation, in nats."""
        return float(self.log_p_C.double().sum())

    @property
    def greedy(self) -> bool:
        """True if greedy decoding writes this continuation."""
        return bool(self.greedy_C.all())


def score(
    model: Transformer, pairs: Sequence[tuple[list[int], list[int]]], batch_tokens: int = BATCH_TOKENS
) -> list[Scored]:
    """Scores of (context, continuation) pairs of token ids, in their order.

    A context has at least one token, such as the begin token. Probabilities are those of the whole head, as in the
    training loss. Raises ConfigError for a pair that the model's context can't hold.
    """
    check_pairs(pairs, model.config.max_position_embeddings)
    scored: list[Scored] = [Scored(torch.empty(0), torch.empty(0, dtype=torch.bool))] * len(pairs)
    wanted = [number for number, (_, continuation) in enumerate(pairs) if continuation]
    lengths = [len(pairs[number][0]) + len(pairs[number][1]) - 1 for number in wanted]
    for batch in length_batches(lengths, batch_tokens):
        numbers = [wanted[place] for place in batch]
        for number, result in zip(numbers, score_batch(model, [pairs[number] for number in numbers]), strict=True):
            scored[number] = result
    return scored


def score_batch(model: Transformer, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Scored]:
    """Scores of pairs with non-empty continuations, in one forward pass."""
    device = next(model.parameters()).device
    rows = [(context + continuation)[:-1] for context, continuation in pairs]
    T = max(map(len, rows))
    tokens_BT = torch.tensor([row + [0] * (T - len(row)) for row in rows], device=device)
    mask_BT = torch.tensor([[True] * len(row) + [False] * (T - len(row)) for row in rows], device=device)
    counts = [len(continuation) for _, continuation in pairs]
    places = [
        range(number * T + len(row) - count, number * T + len(row))
        for number, (row, count) in enumerate(zip(rows, counts, strict=True))
    ]
    places_N = torch.tensor(list(chain.from_iterable(places)), device=device)
    wanted_N = torch.tensor(list(chain.from_iterable(continuation for _, continuation in pairs)), device=device)
    scores = model.token_scores(tokens_BT, mask_BT, places_N, wanted_N)
    log_p, greedy = scores.log_p_N.cpu().split(counts), (scores.best_N == wanted_N).cpu().split(counts)
    return [Scored(*both) for both in zip(log_p, greedy, strict=True)]


def length_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Numbers of texts in batches of at most batch_tokens, padding included; the longest texts come first.

    A text that is longer than that has a batch of its own.

    >>> length_batches([2, 9, 3, 3], 6)
    [[1], [2, 3], [0]]
    """
    batches: list[list[int]] = []
    longest = 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if not batches or longest * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
            longest = lengths[number]
        batches[-1].append(number)
    return batches


def check_pairs(pairs: Sequence[tuple[list[int], list[int]]], limit: int) -> None:
    for number, (context, continuation) in enumerate(pairs):
        size = len(context) + len(continuation)
        if not context:
            raise ConfigError(f"text {number} to score has no context; start it with the begin token")
        if size > limit + 1:
            raise ConfigError(
                f"text {number} to score has {size} tokens, more than the context of {limit} and one more"
            )
