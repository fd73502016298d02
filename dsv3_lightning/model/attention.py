"""Multi-head latent attention (V3 §2.1.1, eq. 1-11), in the form used for training: keys and values are expanded.

Beside it the older family's grouped-query attention (arXiv 2401.02954 §2.2; arXiv 2305.13245), with the same interface.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.norm import RMSNorm
from dsv3_lightning.model.rope import Rotation, rotate, softmax_scale

# Of the two latent norms, whatever `rms_norm_eps` says: released code and transformers agree (transformers#44261).
LATENT_EPS = 1e-6


class MultiHeadLatentAttention(nn.Module):
    """x [B, T, D] -> [B, T, D], causal, within `seen_B1TT`. Parameters are named as in the released checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.nope, self.rope, self.v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.kv_rank = config.kv_lora_rank
        self.scale = softmax_scale(config)
        self.interleave = config.rope_interleave
        hidden = config.hidden_size
        query_size = self.heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, query_size, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_size, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.kv_rank + self.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(self.kv_rank, LATENT_EPS)
        self.kv_b_proj = nn.Linear(self.kv_rank, self.heads * (self.nope + self.v_dim), bias=False)
        self.o_proj = nn.Linear(self.heads * self.v_dim, hidden, bias=False)

    def forward(self, x_BTD: Tensor, at: Rotation, seen_B1TT: Tensor | None = None) -> Tensor:
        q_BHTC, k_BHTC, v_BHTC = self.queries(x_BTD, at), *self.keys_values(x_BTD, at)
        out_BHTC = causal_attention(q_BHTC, k_BHTC, v_BHTC, self.scale, seen_B1TT)
        return self.o_proj(out_BHTC.transpose(1, 2).flatten(2))  # eq. 11

    def queries(self, x_BTD: Tensor, at: Rotation) -> Tensor:
        """[B, H, T, nope + rope] (eq. 6-9)."""
        if hasattr(self, "q_proj"):
            q = self.q_proj(x_BTD)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
        q_BHTC = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q_c, q_r = q_BHTC.split((self.nope, self.rope), -1)
        return torch.cat((q_c, rotate(q_r, at, self.interleave)), -1)

    def keys_values(self, x_BTD: Tensor, at: Rotation) -> tuple[Tensor, Tensor]:
        """[B, H, T, nope + rope] and [B, H, T, v] (eq. 1-5); the rotary key is one per token, shared by all heads."""
        c_kv, k_r = self.kv_a_proj_with_mqa(x_BTD).split((self.kv_rank, self.rope), -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(c_kv)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_c, v_BHTC = kv.split((self.nope, self.v_dim), -1)
        k_r = rotate(k_r, at, self.interleave)[:, None].expand(-1, self.heads, -1, -1)
        return torch.cat((k_c, k_r.to(k_c.dtype)), -1), v_BHTC


class GroupedQueryAttention(nn.Module):
    """x [B, T, D] -> [B, T, D], as above; `num_key_value_heads` keys and values, each shared by H / that many queries.

    As many as H is multi-head attention, 1 is multi-query attention. The first `qk_nope_head_dim` channels of queries
    and keys don't rotate; the older family has none of those. Parameters are named as in its released checkpoints.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.num_key_value_heads is not None, "ModelConfig sees to it"
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.scale = softmax_scale(config)
        self.interleave = config.rope_interleave
        hidden = config.hidden_size
        self.q_proj = nn.Linear(hidden, self.heads * config.qk_head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * config.qk_head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * config.v_head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * config.v_head_dim, hidden, bias=False)

    def forward(self, x_BTD: Tensor, at: Rotation, seen_B1TT: Tensor | None = None) -> Tensor:
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, 1) for x in self.keys_values(x_BTD, at))
        out_BHTC = causal_attention(self.queries(x_BTD, at), k, v, self.scale, seen_B1TT)
        return self.o_proj(out_BHTC.transpose(1, 2).flatten(2))

    def queries(self, x_BTD: Tensor, at: Rotation) -> Tensor:
        """[B, H, T, nope + rope]."""
        return self.rotated(self.q_proj(x_BTD).unflatten(-1, (self.heads, -1)).transpose(1, 2), at)

    def keys_values(self, x_BTD: Tensor, at: Rotation) -> tuple[Tensor, Tensor]:
        """[B, num_key_value_heads, T, nope + rope] and [B, num_key_value_heads, T, v]: what a cache would hold."""
        k, v = (proj(x_BTD).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for proj in (self.k_proj, self.v_proj))
        return self.rotated(k, at), v

    def rotated(self, x_BHTC: Tensor, at: Rotation) -> Tensor:
        fixed, turning = x_BHTC.split((self.nope, self.rope), -1)
        return torch.cat((fixed, rotate(turning, at, self.interleave)), -1)


ATTENTION = {"mla": MultiHeadLatentAttention, "gqa": GroupedQueryAttention}


def own_document(documents_BT: Tensor) -> Tensor:
    """Which positions each may attend to, bool [B, 1, T, T]: those of its own document up to itself.

    documents_BT: the number of each token's document. Distances, all that rotary positions say, stay what they were.
    """
    T = documents_BT.shape[1]
    earlier_TT = torch.ones(T, T, dtype=torch.bool, device=documents_BT.device).tril()
    return (documents_BT[:, None, :, None] == documents_BT[:, None, None, :]) & earlier_TT


def causal_attention(
    q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, scale: float, seen_B1TT: Tensor | None = None
) -> Tensor:
    """softmax(q k^T · scale) v over positions up to one's own (eq. 10), or over those in `seen_B1TT` (`own_document`).

    v may be narrower or wider than q and k.

    All are padded to one width: with unequal ones scaled_dot_product_attention leaves its fast path on CPU.
    """
    width = max(q_BHTC.shape[-1], v_BHTC.shape[-1])
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q_BHTC, k_BHTC, v_BHTC))
    out_BHTC = F.scaled_dot_product_attention(q, k, v, seen_B1TT, is_causal=seen_B1TT is None, scale=scale)
    return out_BHTC[..., : v_BHTC.shape[-1]]
