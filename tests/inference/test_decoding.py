"""Decoding with the cache is the training path, position by position, alone and together with others."""

import itertools
from dataclasses import replace

import pytest
import torch

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.inference import layers
from dsv3_lightning.inference.decode import decode
from dsv3_lightning.inference.decoder import Decoder
from dsv3_lightning.inference.generate import generate
from dsv3_lightning.inference.int8 import Int8, int8_feed_forward
from dsv3_lightning.inference.sampling import Sampling
from dsv3_lightning.inference.single import choose
from dsv3_lightning.inference.speculative import speculate
from dsv3_lightning.model.config import Yarn
from dsv3_lightning.model.router import route
from dsv3_lightning.planning.memory import cache_per_token
from tests.hub.folders import LLAMA, V2_GROUPS, V2_LITE, biased
from tests.model.small import clear_batch, small_config

YARN = Yarn(factor=40, original_max_position_embeddings=32, beta_fast=4, mscale=0.7, mscale_all_dim=1.0)
MODELS = {
    "v3": small_config(),
    "rotating halves, no query latent": small_config(rope_interleave=False, q_lora_rank=None),
    "yarn": small_config(rope_scaling=YARN, qk_rope_head_dim=16, max_position_embeddings=1280),
    "yarn, one weight": small_config(
        rope_scaling=Yarn(factor=40, original_max_position_embeddings=32, mscale=1.0), max_position_embeddings=1280
    ),
    **{
        f"yarn, {a} and {b}": small_config(
            rope_scaling=replace(YARN, mscale=a, mscale_all_dim=b), qk_rope_head_dim=16, max_position_embeddings=1280
        )
        for a, b in ((1.0, 0.7), (0.0, 0.0))
    },
    "long latents": small_config(kv_lora_rank=40),
    "short latents, multiplied biases": small_config(kv_lora_rank=4, expert_bias_kind="multiplicative"),
    "v2": small_config(**V2_GROUPS),
    "v2-lite": small_config(**V2_LITE),
    "gqa": small_config(**LLAMA),
    "gqa, partly rotating": small_config(**LLAMA | {"qk_nope_head_dim": 4, "rope_interleave": True, "v_head_dim": 6}),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_position_has_the_training_paths_logits(name):
    """A prompt at once, then tokens one by one, then several at once: all ways into the cache."""
    model = biased(MODELS[name])
    tokens = clear_batch(model, B=2, T=90).tokens[:, :90]
    expected = model(tokens)
    decoder = Decoder(model, 2, 90)
    parts = [tokens[:, :7], *tokens[:, 7:70].split(1, 1), tokens[:, 70:73], tokens[:, 73:]]
    got = torch.cat([decoder.logits(decoder.extend(part)) for part in parts], 1)
    assert expected.std() > 0.3
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    single = Decoder(model, 1, 90)
    from_the_first = torch.cat([single.logits(single.extend(part)) for part in tokens[:1].split(1, 1)], 1)
    torch.testing.assert_close(from_the_first, expected[:1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["v3", "gqa"])
@torch.no_grad()
def test_rows_of_different_lengths_each_have_their_own_positions(name):
    model = biased(MODELS[name])
    tokens = clear_batch(model, B=3, T=60).tokens[:, :60]
    expected, decoder = model(tokens), Decoder(model, 3, 60)
    lengths = [1, 20, 37]
    for row, length in enumerate(lengths):
        decoder.extend(tokens[row : row + 1, :length], row)
    for T in (1, 3, 1):
        new = torch.stack([tokens[row, length : length + T] for row, length in enumerate(decoder.lengths)])
        before = list(decoder.lengths)
        got = decoder.logits(decoder.extend(new))
        for row, length in enumerate(before):
            torch.testing.assert_close(got[row], expected[row, length : length + T], rtol=0, atol=2e-5)
    assert decoder.lengths == [6, 25, 42]


@torch.no_grad()
def test_forgotten_tokens_leave_no_trace():
    model = biased(MODELS["v3"])
    tokens = clear_batch(model, B=1, T=30).tokens[:, :30]
    decoder = Decoder(model, 1, 40)
    decoder.extend(tokens[:, :20])
    decoder.extend(60 - tokens[:, :8])
    decoder.lengths[0] = 20
    got = decoder.logits(decoder.extend(tokens[:, 20:]))
    torch.testing.assert_close(got, model(tokens)[:, 20:], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_cache_bytes_are_the_planned_ones(name):
    """Of MLA kv_lora_rank + qk_rope_head_dim numbers a token and layer, whatever the number of heads."""
    config = MODELS[name]
    for dtype in (torch.float32, torch.bfloat16):
        decoder = Decoder(biased(config).to(dtype), rows=3, capacity=50)
        assert decoder.cache.entries.nbytes == 3 * 50 * cache_per_token(config) * dtype.itemsize
    if config.attention == "mla":
        assert cache_per_token(config) == 3 * (config.kv_lora_rank + config.qk_rope_head_dim)


GREEDY = Sampling()


@pytest.mark.parametrize("name", ["v3", "gqa"])
def test_prompts_alone_together_and_in_every_order_are_continued_alike(name):
    """Of 1, 40 and 200 tokens; the second ends early."""
    model = biased(MODELS[name])
    stream = torch.randint(61, (241,), generator=torch.Generator().manual_seed(3)).tolist()
    prompts = [stream[:1], stream[1:41], stream[41:]]
    (second,) = decode(model, [prompts[1]], 60, GREEDY, set(), seed=0)
    end = next(token for place, token in enumerate(second) if place > 4 and token not in second[:place])
    alone = [decode(model, [prompt], 60, GREEDY, {end}, seed=0)[0] for prompt in prompts]
    assert alone == generate_all(model, prompts, 60, end)
    assert len(alone[1]) < 60
    for order in itertools.permutations(range(3)):
        together = decode(model, [prompts[i] for i in order], 60, GREEDY, {end}, seed=0)
        assert together == [alone[i] for i in order]


def test_each_prompt_has_random_numbers_of_its_own_whatever_stands_beside_it():
    """Alike prompts, as users give them to see several texts, also with drafts and in training's samples."""
    model, drawn = biased(small_config(num_nextn_predict_layers=1)), Sampling(temperature=1.0)
    same = decode(model, [[1, 2]] * 3, 20, drawn, set(), seed=5)
    assert len(set(map(tuple, same))) == 3
    assert decode(model, [[1, 2]] * 3, 20, drawn, set(), seed=6) != same
    assert decode(model, [[1, 2]], 20, drawn, set(), seed=5) == same[:1]
    beside = decode(model, [[3], [1, 2], [4, 5, 6]], 20, drawn, set(), seed=5)
    assert beside[1] == same[1] and beside[2] != same[2]
    assert generate(model, [[1, 2]] * 3, 20, Sampling(1.0), -1, seed=5) == same
    drafted = [speculate(model, [1, 2], 20, drawn, set(), 5, 1, number=number)[0] for number in range(3)]
    assert len(set(map(tuple, drafted))) == 3


def generate_all(model, prompts, count, end):
    """By running everything again for each token."""
    return [generate(model, [prompt], count, Sampling(), end, seed=0)[0] for prompt in prompts]


def test_padding_is_not_routed(monkeypatch):
    """Every token that goes through a router is one of the texts."""
    model = biased(MODELS["v3"])
    routed = []
    monkeypatch.setattr(layers, "route", lambda scores, *rest: routed.append(len(scores)) or route(scores, *rest))
    new = decode(model, [[1], [2] * 40, [3] * 9], 10, GREEDY, set(), seed=0)
    assert sum(routed) == 2 * (50 + 3 * 9)  # by two layers; the last new token of each goes nowhere
    assert [len(ids) for ids in new] == [10, 10, 10]


@pytest.mark.parametrize("length", [507, 511, 512])
def test_it_stops_at_the_context_limit(length):
    model = biased(MODELS["v3"])
    prompt = torch.arange(length).remainder(61).tolist()
    new = decode(model, [prompt, [1, 2]], 8, GREEDY, set(), seed=0)
    assert [len(ids) for ids in new] == [min(8, 512 - length), 8]


@pytest.mark.parametrize(
    "prompts, count, message",
    [
        ([[1] * 513], 1, "a prompt of 513 tokens is longer than the context of 512 tokens"),
        ([[1], []], 1, "a prompt has no tokens"),
        ([[1]], -1, "max_new_tokens=-1: must be at least 0"),
    ],
)
def test_an_impossible_request_is_one_line(prompts, count, message):
    with pytest.raises(ConfigError, match=message):
        decode(biased(MODELS["v3"]), prompts, count, GREEDY, set(), seed=0)


def test_none_new_is_none():
    assert decode(biased(MODELS["v3"]), [[1], [2]], 0, GREEDY, set(), seed=0) == [[], []]


@pytest.mark.parametrize("name", ["v3", "v2", "v2-lite", "short latents, multiplied biases"])
def test_the_experts_of_a_single_token_are_those_of_the_router(name):
    config, generator = MODELS[name], torch.Generator().manual_seed(0)
    for _ in range(50):
        logits = torch.randn(config.n_routed_experts, generator=generator)
        scores = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(-1)
        bias = torch.randn(config.n_routed_experts, generator=generator) - 0.5
        biased = scores + bias if config.expert_bias_kind == "additive" else scores * (1 + bias)
        experts, gates = choose(scores.tolist(), biased.tolist(), config)
        wanted, weights = route(scores[None], bias, config)
        assert dict(zip(experts, gates, strict=True)) == pytest.approx(
            dict(zip(wanted[0].tolist(), weights[0].tolist(), strict=True)), rel=1e-5
        )


@pytest.mark.parametrize("changes", [{}, V2_LITE], ids=["v3", "v2-lite"])
@torch.no_grad()
def test_int8_weights_are_rounded_row_by_row_to_255_numbers(changes):
    """With the products of bf16: experts, a dense layer and the head, each alone, so that no other expert is chosen."""
    model = biased(small_config(**changes, intermediate_size=64, moe_intermediate_size=32))
    inputs_ND = torch.randn(30, 32, generator=torch.Generator().manual_seed(0))
    parts = [int8_feed_forward(block.mlp) for block in model.layers[:2]]
    got = [torch.zeros_like(inputs_ND) for _ in parts]
    for part, out_ND in zip(parts, got, strict=True):
        for x_D, h_D in zip(out_ND, inputs_ND, strict=True):
            part(x_D, h_D)
    got.append(Int8(model.lm_head.weight)(inputs_ND.bfloat16()).float())

    def rounded(weight, dim):
        step = (weight.abs().amax(dim, keepdim=True) / 127).bfloat16().float()
        return (weight / step).round().clamp(-127, 127) * step

    mask = torch.ones(1, 30, dtype=torch.bool)
    exact = [*(block.mlp(inputs_ND[None], mask)[0][0] for block in model.layers[:2]), model.lm_head(inputs_ND)]
    for parameter in model.parameters():
        if parameter.dim() == 3:
            parameter.copy_(rounded(parameter, 1))  # [E, inputs, outputs]
    for where, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and (".mlp." in where or where == "lm_head"):
            module.weight.copy_(rounded(module.weight, 1))
    wanted = [*(block.mlp(inputs_ND[None], mask)[0][0] for block in model.layers[:2]), model.lm_head(inputs_ND)]
    for one, rounded_one, exact_one in zip(got, wanted, exact, strict=True):
        assert (one - rounded_one).square().mean().sqrt() < 0.01 * exact_one.std()
        assert 0 < (rounded_one - exact_one).square().mean().sqrt() < 0.02 * exact_one.std()


def test_int8_weights_where_they_cannot_be_are_one_line():
    for name, rows in (("v3", 2), ("gqa", 1)):
        with pytest.raises(ConfigError, match="--weights int8: is for one text at a time"):
            Decoder(biased(MODELS[name]), rows, 8, weights="int8")
    with pytest.raises(ConfigError, match="--weights int8: every width must be a multiple of 32; the model has one of"):
        Decoder(biased(MODELS["v3"]), 1, 8, weights="int8")
