"""Drafts change the speed, never the text: greedy is token for token plain, and sampling has the same distribution."""

import pytest
import torch
import torch.nn.functional as F

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.inference.decode import decode
from dsv3_lightning.inference.decoder import Decoder
from dsv3_lightning.inference.sampling import Sampling
from dsv3_lightning.inference.speculative import Speculation, accept, speculate
from dsv3_lightning.model.transformer import Transformer
from tests.hub.folders import biased
from tests.model.small import small_config

pytestmark = pytest.mark.slow

GREEDY = Sampling()


def model_with(depth: int, agreeing: bool = False, **changes) -> Transformer:
    """Untrained modules, whose drafts are mostly wrong; or agreeing: a successor table that all heads know.

    The main model's blocks and the modules' add little to the embedding, and the head says which token follows it.
    """
    model = biased(small_config(num_nextn_predict_layers=depth, **changes))
    if agreeing:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                    parameter.mul_(0.05)
            D = model.config.hidden_size
            for module in model.mtp:
                module.eh_proj.weight.zero_()
                module.eh_proj.weight[:, :D] = torch.eye(D)  # the embedding of the token in between
                for norm in (module.enorm, module.norm):
                    norm.weight.fill_(1.0)
            model.norm.weight.fill_(1.0)
            table = F.normalize(torch.randn(model.config.vocab_size, D, generator=torch.Generator().manual_seed(1)))
            model.embed_tokens.weight.copy_(3 * table)
            model.lm_head.weight.copy_(3 * table.roll(1, 0))
    return model


@pytest.mark.parametrize("agreeing", [False, True])
@pytest.mark.parametrize("depth, used", [(1, 1), (2, 2), (2, 1), (3, 3)])
def test_greedy_text_is_that_of_plain_decoding(depth, used, agreeing):
    """Prompts of 1 token to one that leaves room for two; 300 tokens, or to the context limit."""
    model = model_with(depth, agreeing, max_position_embeddings=320)
    stream = torch.randint(61, (318,), generator=torch.Generator().manual_seed(7)).tolist()
    shares = []
    for length in (1, 2, 100, 317, 318):
        prompt = stream[:length]
        (plain,) = decode(model, [prompt], 300, GREEDY, set(), seed=0)
        text, counts = speculate(model, prompt, 300, GREEDY, set(), 0, used)
        assert text == plain and len(text) == min(300, 320 - length)
        assert counts.passes + sum(counts.accepted) == len(
            text
        )  # a pass is a token, and one more for each accepted draft
        shares.append(counts.acceptance()[0])
    assert all(share < 0.5 for share in shares[:3]) if not agreeing else all(share > 0.9 for share in shares[:3])


def test_the_batch_beside_it_gives_the_same_text():
    model = model_with(2)
    prompts = [[5], [6] * 30, list(range(60)), [7, 8]]
    together = decode(model, prompts, 100, GREEDY, set(), seed=0)
    assert together == [speculate(model, prompt, 100, GREEDY, set(), 0, 2)[0] for prompt in prompts]


def test_caches_hold_the_tokens_kept_and_nothing_else():
    """After every round: all tokens but the last, and of module k the indices whose tokens are all certain."""
    model = model_with(2)
    decoder = Decoder(model, 1, 100, 2)
    text = Speculation(decoder, [3, 1, 4], GREEDY, torch.Generator())
    text.begin()
    for _ in range(20):
        text.round(2)
        n = len(text.tokens) - 1
        fresh = Decoder(model, 1, 100, 2)
        h = fresh.extend(torch.tensor([text.tokens[:n]]))
        assert decoder.lengths == [n]
        torch.testing.assert_close(decoder.cache.entries[:3, :, :n], fresh.cache.entries[:3, :, :n], rtol=0, atol=2e-5)
        for k in (1, 2):
            seen = decoder.mtp_lengths[k - 1][0]
            h = fresh.extend_mtp(k, h[:, : n - k + 1], torch.tensor([text.tokens[k : n + 1]]))
            assert 0 < seen <= n - k + 1
            ours, theirs = (d.cache.entries[2 + k, :, :seen] for d in (decoder, fresh))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("agreeing", [False, True])
def test_an_end_token_ends_it_also_among_accepted_drafts(agreeing):
    model = model_with(1, agreeing)
    (plain,) = decode(model, [[1, 2]], 60, GREEDY, set(), seed=0)
    for place in (0, 1, 2, 9):
        end = plain[place]
        expected = plain[: plain.index(end)]
        assert speculate(model, [1, 2], 60, GREEDY, {end}, 0, 1)[0] == expected
        counts = speculate(model, [1, 2], 60, GREEDY, {end}, 0, 1)[1]
        assert counts.tokens == len(expected) + 1  # the end token too, and nothing behind it
    seen = []
    speculate(model, [1, 2], 60, GREEDY, set(), 0, 1, on_token=lambda token: seen.append(token) or len(seen) == 7)
    assert seen == plain[:7]


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> tuple[float, int]:
    rare = expected < 5  # together
    cells = [*zip(counts[~rare], expected[~rare]), (counts[rare].sum(), expected[rare].sum())]
    cells = [(float(c), float(e)) for c, e in cells if e > 1]
    return sum((c - e) ** 2 / e for c, e in cells), len(cells) - 1


def bound(degrees: int) -> float:
    """A chi-square of that many degrees of freedom is above it once in 10,000 times (Wilson and Hilferty)."""
    return degrees * (1 - 2 / (9 * degrees) + 3.719 * (2 / (9 * degrees)) ** 0.5) ** 3


def test_the_rejection_rule_leaves_the_main_models_distribution():
    """Two drafts from q, far from p: every pair of first tokens comes as often as under p alone."""
    g = torch.Generator().manual_seed(0)
    q = [torch.tensor([0.7, 0.2, 0.1, 0.0]).double(), torch.tensor([0.05, 0.05, 0.3, 0.6]).double()]
    p = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.5, 0.1, 0.1, 0.3], [0.25, 0.25, 0.1, 0.4]]).double()
    counts, seconds, n = torch.zeros(4), torch.zeros(4), 20_000
    for _ in range(n):
        drafts = [int(torch.multinomial(q_V, 1, generator=g)) for q_V in q]
        got = accept(drafts, q, p, g)
        counts[got[0]] += 1
        if len(got) > 1:
            seconds[got[1]] += 1
    value, degrees = chi_square(counts, p[0] * n)
    assert value < bound(degrees)
    value, degrees = chi_square(seconds, p[1] * seconds.sum())
    assert value < bound(degrees)
    value, degrees = chi_square(counts, q[0] * n)
    assert value > 10 * bound(degrees)  # so it would be seen if drafts were just taken


@pytest.mark.parametrize("settings", [{}, {"top_k": 4}])
@torch.no_grad()
def test_sampled_texts_come_as_often_as_from_the_main_model_alone(settings):
    """The first three tokens of 1,200 texts against the product of exact probabilities."""
    model = model_with(2, vocab_size=6, hidden_size=16, num_hidden_layers=1, first_k_dense_replace=0)
    sampling, prompt, n = Sampling(1.0, **settings), [1, 2], 1200
    triples = torch.cartesian_prod(*[torch.arange(6)] * 3)
    texts = torch.cat((torch.tensor(prompt).expand(len(triples), -1), triples), 1)
    logits = model(texts)
    expected = torch.full((len(triples),), float(n), dtype=torch.float64)
    for place in range(3):
        p = sampling.probabilities(logits[:, 1 + place])
        expected *= p.gather(1, triples[:, place : place + 1])[:, 0]
    counts, accepted = torch.zeros(216), 0
    for seed in range(n):
        text, drafts = speculate(model, prompt, 4, sampling, set(), seed, 2)
        counts[text[0] * 36 + text[1] * 6 + text[2]] += 1
        accepted += sum(drafts.accepted)
    value, degrees = chi_square(counts, expected)
    assert value < bound(degrees), (value, degrees)
    assert accepted > 250


@pytest.mark.parametrize("changes, depth", [({}, 2), ({}, 0), ({"mtp_kind": "parallel"}, 1)])
def test_modules_that_are_not_there_are_one_line(changes, depth):
    with pytest.raises(ConfigError, match=f"draft={depth}: must be between 1 and the model's MTP depth, 1"):
        speculate(model_with(1, **changes), [1], 5, GREEDY, set(), 0, depth)


@pytest.mark.parametrize(
    "end, tokens, accepted, drafted", [(3, 2, [1, 0], [1, 0]), (4, 3, [1, 1], [1, 1]), (5, 4, [1, 1], [1, 1])]
)
def test_drafts_behind_the_end_are_not_counted(monkeypatch, end, tokens, accepted, drafted):
    """The prompt is followed by 2; one round then gives 3 and 4, two accepted drafts, and 5 of the main model."""
    monkeypatch.setattr(Speculation, "begin", lambda self: self.tokens.append(2))
    monkeypatch.setattr(Speculation, "round", lambda self, depth: [3, 4, 5])
    text, counts = speculate(model_with(2), [1], 10, GREEDY, {end}, 0, 2)
    assert text == list(range(2, end))
    assert (counts.passes, counts.tokens, counts.accepted, counts.drafted) == (2, tokens, accepted, drafted)
