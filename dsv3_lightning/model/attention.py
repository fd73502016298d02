"""Multi-head latent attention (V3 §2.1.1, eq. 1-11), in the form used for training: keys and values are expanded."""

import torch
from torch import Tensor, nn

from dsv3_lightning.model.attention_kernels import Documents, causal_attention
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.norm import RMSNorm
from dsv3_lightning.model.rope import CosSin, apply_rope, softmax_scale
from dsv3_lightning.model.weight_grad import Linear

# Both latent norms have this eps, whatever `rms_norm_eps` says, in the released code as in transformers (#44261).
LATENT_EPS = 1e-6


class MultiHeadLatentAttention(nn.Module):
    """x [B, T, D] -> [B, T, D], causal, within `documents`. Parameters are named as in the released checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.nope_size, self.rope_size = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.v_size, self.kv_rank = config.v_head_dim, config.kv_lora_rank
        self.compresses_queries = config.q_lora_rank is not None
        self.scale = softmax_scale(config)
        self.interleave = config.rope_interleave
        hidden = config.hidden_size
        query_size = self.heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, query_size)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, query_size)
        self.kv_a_proj_with_mqa = Linear(hidden, self.kv_rank + self.rope_size)
        self.kv_a_layernorm = RMSNorm(self.kv_rank, LATENT_EPS)
        self.kv_b_proj = Linear(self.kv_rank, self.heads * (self.nope_size + self.v_size))
        self.o_proj = Linear(self.heads * self.v_size, hidden)

    def forward(self, x_BTD: Tensor, rope: CosSin, documents: Documents | None = None) -> Tensor:
        q_BHTC, k_BHTC, v_BHTC = self.queries(x_BTD, rope), *self.keys_values(x_BTD, rope)
        out_BHTC = causal_attention(q_BHTC, k_BHTC, v_BHTC, self.scale, documents)
        return self.o_proj(out_BHTC.transpose(1, 2).flatten(2))  # eq. 11

    def queries(self, x_BTD: Tensor, rope: CosSin) -> Tensor:
        """[B, H, T, nope + rope] (eq. 6-9)."""
        if self.compresses_queries:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
        else:
            q = self.q_proj(x_BTD)
        q_BHTC = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q_c, q_r = q_BHTC.split((self.nope_size, self.rope_size), -1)
        return torch.cat((q_c, apply_rope(q_r, rope, self.interleave)), -1)

    def keys_values(self, x_BTD: Tensor, rope: CosSin) -> tuple[Tensor, Tensor]:
        """[B, H, T, nope + rope] and [B, H, T, v] (eq. 1-5); the rotary key is one per token, shared by all heads."""
        c_kv, k_r = self.kv_a_proj_with_mqa(x_BTD).split((self.kv_rank, self.rope_size), -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(c_kv)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_c, v_BHTC = kv.split((self.nope_size, self.v_size), -1)
        k_r = apply_rope(k_r, rope, self.interleave)[:, None].expand(-1, self.heads, -1, -1)
        return torch.cat((k_c, k_r.to(k_c.dtype)), -1), v_BHTC
