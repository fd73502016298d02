"""Grouped-query attention against transformers' Llama, which is what DeepSeek LLM's checkpoints load as."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.grouped_query import GroupedQueryAttention
from dsv3_lightning.model.rope import cos_sin
from dsv3_lightning.planning.memory import cache_per_token

from .small import small_config, small_model

GQA = {
    "attention": "gqa", "kv_lora_rank": 0, "q_lora_rank": None, "num_attention_heads": 6, "rope_interleave": False,
    "qk_nope_head_dim": 0, "qk_rope_head_dim": 10, "v_head_dim": 10,
}  # fmt: skip
DENSE = {
    "first_k_dense_replace": 3, "n_routed_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0,
    "n_group": 1, "topk_group": 1, "hidden_size": 48,
}  # fmt: skip


def gqa_config(kv_heads: int, **changes) -> ModelConfig:
    return small_config(**GQA | DENSE | {"num_key_value_heads": kv_heads} | changes)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("changes", [{}, {"rope_theta": 10000.0, "rms_norm_eps": 1e-3}])
@torch.no_grad()
def test_logits_equal_llamas(kv_heads, changes):
    model = small_model(gqa_config(kv_heads, **changes))
    tokens = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(0))
    ours, theirs = model(tokens), llama(model)(tokens).logits
    assert theirs.std() > 0.3
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def llama(model):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model.config
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.qk_head_dim,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            max_position_embeddings=config.max_position_embeddings,
            attn_implementation="eager",
        )  # fmt: skip
    )
    state = {name if name == "lm_head.weight" else f"model.{name}": p for name, p in model.state_dict().items()}
    theirs.load_state_dict(state, strict=True)  # the same names throughout
    return theirs.eval()


@pytest.mark.parametrize("nope, rope, v", [(4, 6, 10), (3, 4, 12), (8, 2, 5)])
@torch.no_grad()
def test_partly_rotating_heads_follow_the_equations(nope, rope, v):
    """In fp64, head by head: query head h meets key head h // (H / KV), and only the last channels rotate."""
    config = gqa_config(2, qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=v, rope_interleave=True)
    attention = GroupedQueryAttention(config)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    x = torch.randn(1, 9, 48, generator=torch.Generator().manual_seed(1))
    got = attention(x, cos_sin(config, torch.arange(9)))

    def turned(channels: torch.Tensor) -> torch.Tensor:  # [T, rope]: pair i of position t by t · theta^(-2i / rope)
        pairs = torch.view_as_complex(channels.unflatten(-1, (-1, 2)).contiguous())
        angle = torch.arange(9, dtype=torch.float64)[:, None] * config.rope_theta ** (
            -torch.arange(0, rope, 2, dtype=torch.float64) / rope
        )
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)

    q, k, values = (x[0].double() @ p.weight.double().T for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    heads = []
    for h in range(6):
        query = q[:, h * (nope + rope) : (h + 1) * (nope + rope)]
        key = k[:, (h // 3) * (nope + rope) : (h // 3 + 1) * (nope + rope)]
        score = query[:, :nope] @ key[:, :nope].T + turned(query[:, nope:]) @ turned(key[:, nope:]).T
        score = (score / (nope + rope) ** 0.5).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
        heads.append(F.softmax(score, -1) @ values[:, (h // 3) * v : (h // 3 + 1) * v])
    expected = torch.cat(heads, -1) @ attention.o_proj.weight.double().T
    torch.testing.assert_close(got[0].double(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_it_takes_mlas_place_in_a_model_with_experts_and_mtp():
    config = small_config(**GQA | {"num_key_value_heads": 2, "num_nextn_predict_layers": 1})
    model = small_model(config)
    assert model.losses(torch.zeros(1, 10, dtype=torch.long), torch.ones(1, 10).bool(), torch.ones(1, 2, 8).long())
    assert cache_per_token(config) == 3 * 2 * (10 + 10)
    assert cache_per_token(replace(config, num_key_value_heads=6)) == 3 * 6 * 20
    assert cache_per_token(small_config()) == 3 * (12 + 8)
