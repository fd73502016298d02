"""Sampled answers: independent of the batch, distributed as the model says, with one pass over each prompt."""

import pytest
import torch

from dsv3_lightning.inference.decode import decode
from dsv3_lightning.inference.decoder import Decoder
from dsv3_lightning.inference.rollout import Key, inverse_cdf, sample_answers, uniforms
from dsv3_lightning.inference.sampling import Sampling
from dsv3_lightning.model.router import Router
from tests.model.small import small_config, small_model

PROMPTS = [[1, 5, 9], [1, 7], [1, 5, 9, 4, 3, 8]]
KEYS = [Key(3, 11, number) for number in range(3)]
CONFIG = small_config(num_nextn_predict_layers=1)
MODEL = small_model(CONFIG).eval()


def answers(prompts=PROMPTS, keys=KEYS, samples=4, length=6, temperature=1.3, ends=frozenset({2, 17}), routed=0):
    return sample_answers(MODEL, prompts, keys, samples, length, temperature, set(ends), routed)


def test_an_answer_depends_on_its_own_key_alone():
    together = answers()
    for prompt, key, found in zip(PROMPTS, KEYS, together, strict=True):
        assert answers([prompt], [key])[0].tokens == found.tokens
        assert answers([prompt], [key], samples=2)[0].tokens == found.tokens[:2]
    assert answers() == together  # as after a kill
    others = answers(keys=[key._replace(step=12) for key in KEYS])
    assert [one.tokens for one in others] != [one.tokens for one in together]
    assert len({tuple(tokens) for tokens in together[0].tokens}) > 1


def test_an_answer_ends_with_any_end_token_which_belongs_to_it_or_is_cut():
    ends = set(range(0, 61, 6))
    found = [(tokens, ended) for one in answers(ends=ends, length=8) for tokens, ended in zip(one.tokens, one.ended)]
    assert {True, False} == {ended for _, ended in found}
    for tokens, ended in found:
        assert ended == (tokens[-1] in ends) and not ends & set(tokens[:-1])
        assert ended or len(tokens) == 8


def test_temperature_zero_is_greedy_decoding():
    expected = decode(MODEL, PROMPTS, 6, Sampling(), set(), seed=0)
    assert [one.tokens[0] for one in answers(temperature=0, samples=1, ends=frozenset())] == expected


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_tokens_are_drawn_from_the_tempered_distribution(temperature):
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, 0.5])
    drawn, log_p = inverse_cdf(logits.expand(20000, -1), uniforms(Key(0, 0, 0), 1, 20000)[0], temperature)
    shares = torch.bincount(drawn, minlength=5) / len(drawn)
    p = (logits / temperature).softmax(0)
    assert ((shares - p).abs() < 4 * (p * (1 - p) / len(drawn)).sqrt()).all()
    torch.testing.assert_close(log_p.float(), p.log()[drawn])


def test_log_probabilities_of_a_rollout_are_those_of_the_models_pass_over_the_answer():
    found = answers(temperature=1.3)
    for prompt, one in zip(PROMPTS, found, strict=True):
        for tokens, log_p in zip(one.tokens, one.log_p, strict=True):
            pairs = [(prompt + tokens[:place], [token]) for place, token in enumerate(tokens)]
            cut = [torch.tensor([context]) for context, _ in pairs]
            logits = torch.cat([MODEL(ids, torch.tensor([ids.shape[1] - 1])) for ids in cut]).double() / 1.3
            expected = logits.log_softmax(-1)[range(len(tokens)), tokens]
            torch.testing.assert_close(torch.tensor(log_p, dtype=torch.float64), expected, rtol=0, atol=1e-4)


def test_samples_of_a_prompt_share_one_pass_over_it(monkeypatch):
    widths = []
    extend = Decoder.extend
    monkeypatch.setattr(
        Decoder, "extend", lambda self, tokens, first=0: widths.append(tokens.shape) or extend(self, tokens, first)
    )
    answers(samples=5)
    assert [tuple(shape) for shape in widths if shape[1] > 1] == [(1, len(prompt)) for prompt in PROMPTS]


def test_the_experts_of_a_rollout_are_those_of_the_model_and_can_be_replayed():
    found, others = answers(PROMPTS[:2], KEYS[:2], samples=2, routed=1)
    assert others.routes is None  # of the first prompt alone
    routers = [module for block in MODEL.layers for module in block.modules() if isinstance(module, Router)]
    seen = []
    handles = [router.register_forward_hook(lambda m, i, out: seen.append(out.experts_NK)) for router in routers]
    for tokens, route in zip(found.tokens, found.routes, strict=True):
        seen.clear()
        MODEL(torch.tensor([[*PROMPTS[0], *tokens[:-1]]]))
        assert route.shape == (len(PROMPTS[0]) + len(tokens) - 1, len(routers), CONFIG.num_experts_per_tok)
        for layer, own in enumerate(seen):
            assert torch.equal(own.sort(1).values, torch.from_numpy(route[:, layer]).long().sort(1).values)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_replayed_experts_keep_the_gradient_of_the_router(checkpointing):
    """Gates come from the router's own scores; a second pass of activation checkpointing replays, too."""
    model = small_model(CONFIG, activation_checkpointing=checkpointing)
    router = next(module for module in model.modules() if isinstance(module, Router))
    tokens = torch.tensor([PROMPTS[2]])
    own = []
    handle = router.register_forward_hook(lambda m, i, out: own.append(out.experts_NK))
    h, _ = model.trunk(model.embed_tokens(tokens), torch.ones_like(tokens, dtype=torch.bool))
    handle.remove()
    E, K = CONFIG.n_routed_experts, CONFIG.num_experts_per_tok
    router.replay = (own[0] + 1) % E  # others than its own
    replayed, _ = model.trunk(model.embed_tokens(tokens), torch.ones_like(tokens, dtype=torch.bool))
    assert not torch.allclose(h, replayed) and router.replay.shape == (tokens.shape[1], K)
    replayed.square().sum().backward()
    assert router.weight.grad.abs().max() > 0
    router.replay = own[0]
    again, _ = model.trunk(model.embed_tokens(tokens), torch.ones_like(tokens, dtype=torch.bool))
    assert torch.equal(again, h)
