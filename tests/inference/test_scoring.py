"""Scores of continuations are those of one training forward pass per text."""

import pytest
import torch

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.inference import scoring
from dsv3_lightning.model import scores
from tests.hub.folders import LLAMA, V2_LITE, biased
from tests.model.small import small_config

PAIRS = [([1], [5, 7, 9]), ([1, 2, 3, 4, 5, 6, 7], [8]), ([3, 1, 4], []), ([2, 7, 1], list(range(20))), ([9], [4])]


def alone(model, context, continuation):
    """Log-probabilities and greedy flags, token by token, in fp64 from the logits of one unpadded forward pass."""
    logits_TV = model(torch.tensor([[*context, *continuation]]))[0].double()
    found = []
    for place, token in enumerate(continuation, start=len(context) - 1):
        p_V = logits_TV[place].exp() / logits_TV[place].exp().sum()
        found.append((float(p_V[token].log()), int(logits_TV[place].argmax()) == token))
    return found


@pytest.mark.parametrize("changes", [{}, V2_LITE, LLAMA], ids=["v3", "v2-lite", "gqa"])
@torch.no_grad()
def test_scores_are_those_of_each_text_alone_in_any_batch(changes, monkeypatch):
    model = biased(small_config(**changes))
    best = int(model(torch.tensor([[1]]))[0, -1].argmax())
    pairs = [*PAIRS, ([1], [best])]
    monkeypatch.setattr(scores, "MAX_LOGITS_CPU", 5 * 61)  # some rows of the head at a time
    for batch_tokens in (1, 16, 4096):
        for (context, continuation), got in zip(pairs, scoring.score(model, pairs, batch_tokens), strict=True):
            expected = alone(model, context, continuation)
            assert got.greedy_C.tolist() == [greedy for _, greedy in expected]
            assert got.log_p_C.dtype == torch.float32
            torch.testing.assert_close(
                got.log_p_C.double(), torch.tensor([p for p, _ in expected]).double(), rtol=0, atol=1e-5
            )
            assert got.total == pytest.approx(sum(p for p, _ in expected), abs=1e-5)
            assert got.greedy == all(greedy for _, greedy in expected)
    assert scoring.score(model, pairs)[-1].greedy


def test_batches_hold_each_text_once_and_no_more_tokens_than_asked_for():
    lengths = torch.randint(1, 90, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = scoring.length_batches(lengths, 256)
    assert sorted(number for batch in batches for number in batch) == list(range(200))
    assert all(max(lengths[number] for number in batch) * len(batch) <= 256 for batch in batches)
    assert len(batches) < 1.3 * sum(lengths) / 256
    assert scoring.length_batches([], 5) == [] and scoring.length_batches([9, 9], 5) == [[0], [1]]


def test_what_cannot_be_scored_is_one_line():
    model = biased(small_config(max_position_embeddings=8))
    assert len(scoring.score(model, [([1] * 8, [2])])[0].log_p_C) == 1
    with pytest.raises(ConfigError, match="text 1 to score has 10 tokens, more than the context of 8"):
        scoring.score(model, [([1], [2]), ([1] * 8, [2, 3])])
    with pytest.raises(ConfigError, match="text 0 to score has no context"):
        scoring.score(model, [([], [2])])
