"""Logits equal those of transformers' DeepseekV3 and DeepseekV2 with the same weights, position by position.

Its attention is the plain one and its experts a loop, so little is shared but torch. Weights are large and biases far
from 0, so that each part moves the logits by much more than the tolerance (the last tests show it).

All have rms_norm_eps = 1e-6: transformers (5.24) gives the norms of the compressed latents that value whatever the
configuration says (huggingface/transformers#44261), and so does the released code; here they follow the configuration.
"""

import random
from dataclasses import replace

import pytest
import torch

from dsv3_lightning.model.config import ModelConfig, Yarn
from dsv3_lightning.model.losses import IGNORE

from .hf_weights import hf_model, hf_mtp_state
from .small import clear_batch, small_config, small_model

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # no shared expert is width 0 there

TOLERANCE = 1e-4
V2 = {"scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 16.0}


def random_v3_config(seed: int) -> ModelConfig:
    """Sizes at random; features by the seed, so that eight seeds hold each of them more than once."""
    draw = random.Random(seed)
    groups = [4, 1, 2, 8][seed % 4]
    experts = groups * draw.choice([2, 4]) if groups > 1 else 12
    open_groups = draw.randint(1, max(1, groups - 1))
    layers = draw.randint(2, 4)
    return small_config(
        vocab_size=draw.randint(50, 90),
        hidden_size=draw.choice([32, 40, 48]),
        num_hidden_layers=layers,
        first_k_dense_replace=seed // 2 % 3 if layers > 2 else 1,
        num_attention_heads=draw.randint(1, 4),
        intermediate_size=draw.randint(20, 60),
        q_lora_rank=[None, draw.randint(8, 24)][seed % 2],
        kv_lora_rank=draw.randint(8, 24),
        qk_nope_head_dim=draw.randint(4, 12),
        qk_rope_head_dim=2 * draw.randint(2, 6),
        v_head_dim=draw.randint(4, 20),  # narrower and wider than queries
        n_routed_experts=experts,
        num_experts_per_tok=draw.randint(1, experts // groups * open_groups - 1),
        moe_intermediate_size=draw.choice([8, 16, 24]),
        n_shared_experts=seed % 4,
        n_group=groups,
        topk_group=open_groups,
        norm_topk_prob=seed != 5,
        routed_scaling_factor=draw.choice([1.0, 2.5]),
        rope_theta=draw.choice([100.0, 10000.0, 50000.0]),
        rope_interleave=seed // 2 % 2 == 0,
        tie_word_embeddings=seed % 3 == 2,
    )


@pytest.mark.parametrize("seed", range(8))
def test_logits_equal_deepseek_v3_for_random_shapes(seed):
    # Bias -1.5 ± 1: most choices are negative, so a mask of 0 in place of -inf would open closed groups.
    assert_same_logits(small_model(random_v3_config(seed), seed, bias=(-1.5, 1.0)), T=40)


def test_logits_equal_deepseek_v3_with_values_wider_than_queries():
    assert_same_logits(small_model(small_config(v_head_dim=20), bias=(-1.5, 1.0)), T=40)  # queries: 18


def test_logits_equal_deepseek_v3_with_another_norm_epsilon():
    # The latent norms keep 1e-6 there and in the released code, whatever rms_norm_eps is for the others.
    assert_same_logits(small_model(small_config(rms_norm_eps=1e-2), bias=(-1.5, 1.0)), T=40)


YARN_WEIGHTS = [(1.0, 1.0), (0.7, 1.0), (1.0, 0.7), (1.0, 0.0), (0.7, 0.0), (0.0, 0.7), (0.0, 0.0)]  # 0: absent


@pytest.mark.parametrize("factor", [40, 40.0])
@pytest.mark.parametrize("weights", YARN_WEIGHTS)
def test_logits_equal_deepseek_v3_with_yarn(weights, factor):
    # 100 positions, 64 of them within the original length. Where one weight is absent, the rotary part's factor is that
    # of weight 1, whatever the other is.
    assert_same_logits(small_model(yarn_config(*weights, factor=factor), bias=(-1.5, 1.0)), T=100)


@pytest.mark.parametrize("weights", [(0.0, 0.0), (0.7, 1.0)])
@pytest.mark.parametrize("method, groups", [("greedy", (1, 1)), ("group_limited_greedy", (4, 2))])
def test_logits_equal_deepseek_v2(method, groups, weights):
    # V2 has no expert bias. transformers never normalizes its gates, whatever norm_topk_prob says.
    config = yarn_config(*weights) if any(weights) else small_config(n_shared_experts=2)
    config = replace(config, **V2, topk_method=method, n_group=groups[0], topk_group=groups[1])
    assert_same_logits(small_model(config, bias=(0.0, 0.0)), T=100)


def test_loss_of_the_first_mtp_module_equals_transformers():
    # Deeper ones can't be compared: transformers (5.24) hands module k + 1 the output of module k after its norm, the
    # inference engines of the released weights the one before it.
    MtpModel = pytest.importorskip("transformers.modeling_layers").__dict__.get("MtpModel")
    if MtpModel is None:
        pytest.skip("this transformers has no MtpModel")
    config = small_config(num_nextn_predict_layers=1)
    model = small_model(config, bias=(-1.5, 1.0))
    batch = clear_batch(model, B=2, T=30)
    main = hf_model(model)
    module = MtpModel(main, 1).eval()
    module.load_state_dict(hf_mtp_state(model), strict=True)
    with torch.no_grad():
        h_0 = main.model(batch.tokens[:, :30]).last_hidden_state
        h_1 = module.forward_layer(0, h_0, torch.arange(1, 31)[None], None, input_ids=batch.tokens[:, 1:31])
        logits = torch.stack([main.lm_head(h_0), main.lm_head(h_1)], 1)  # [B, 1 + depth, T, V]
        nll = torch.nn.functional.cross_entropy(
            logits.flatten(0, 2).double(), batch.targets.flatten(), ignore_index=IGNORE, reduction="none"
        )
        ours = model.losses(*batch).nll_P
    torch.testing.assert_close(ours.double(), nll.unflatten(0, (2, 2, 30)).sum((0, 2)), rtol=1e-6, atol=0)


def test_an_integer_factor_is_that_number():
    tokens = torch.arange(100)[None] % 61
    integer, real = (small_model(yarn_config(0.7, 1.0, factor=factor))(tokens) for factor in (40, 40.0))
    assert torch.equal(integer, real)


@torch.no_grad()
def test_each_part_moves_the_logits_by_far_more_than_the_tolerance():
    model = small_model(yarn_config(0.7, 1.0), bias=(-1.5, 1.0))
    tokens = torch.randint(61, (2, 100), generator=torch.Generator().manual_seed(0))
    right = model(tokens)
    yarn = model.config.rope_scaling
    settings = [
        {"rope_interleave": False},
        {"rope_theta": 120.0},
        {"rope_scaling": None},
        {"rope_scaling": replace(yarn, factor=30)},
        {"rope_scaling": replace(yarn, mscale=1.0)},  # another factor on the rotary part
        {"rope_scaling": replace(yarn, mscale_all_dim=0.7)},  # another softmax scale, too
        {"rope_scaling": replace(yarn, beta_fast=8)},  # the ramp starts elsewhere
        {"rope_scaling": replace(yarn, beta_slow=2)},
        {"rope_scaling": replace(yarn, original_max_position_embeddings=100)},
        {"norm_topk_prob": False},
        {"routed_scaling_factor": 2.4},
        {"topk_group": 1, "num_experts_per_tok": 2},
        {"topk_method": "group_limited_greedy"},  # groups scored by their best expert
        {"n_group": 1, "topk_group": 1},
        {"rms_norm_eps": 1e-3},
    ]
    for wrong in settings:
        other = small_model(replace(model.config, **wrong), bias=(-1.5, 1.0))
        other.load_state_dict(model.state_dict())
        assert (other(tokens) - right).abs().max() > 50 * TOLERANCE, wrong
    without_bias = small_model(model.config)
    without_bias.load_state_dict(
        {name: torch.zeros_like(t) if "expert_bias" in name else t for name, t in model.state_dict().items()}
    )
    assert (without_bias(tokens) - right).abs().max() > 50 * TOLERANCE


@torch.no_grad()
def test_a_wrong_softmax_factor_shows_only_after_position_0():
    # So a test of the first logits alone proves nothing: position 0 attends to itself, whatever the scale.
    tokens = torch.randint(61, (2, 100), generator=torch.Generator().manual_seed(0))
    one, other = (small_model(yarn_config(1.0, weight))(tokens) for weight in (1.0, 0.7))
    difference_T = (one - other).abs().amax((0, 2))
    assert difference_T[0] < 1e-5 < TOLERANCE < difference_T[1:].min()


def yarn_config(mscale: float, mscale_all_dim: float, factor: float = 40) -> ModelConfig:
    """Of 8 rotary frequencies one is kept, four lie on the ramp and three are divided: floors and ceilings count."""
    yarn = Yarn(
        factor=factor,
        original_max_position_embeddings=64,
        beta_fast=4,
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
    )
    return small_config(rope_scaling=yarn, qk_rope_head_dim=16, max_position_embeddings=2560)


@torch.no_grad()
def assert_same_logits(model, T: int) -> None:
    tokens = clear_batch(model, B=2, T=T).tokens[:, :T]
    ours, theirs = model(tokens), hf_model(model)(tokens).logits
    assert theirs.std() > 0.3  # not so small that anything agrees
    difference_T = (ours - theirs).abs().amax((0, 2))
    assert difference_T.max() <= TOLERANCE, f"from position {(difference_T > TOLERANCE).nonzero()[0].item()} on"
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
