"""Grouped-query attention of the older family (arXiv 2401.02954 §2.2; arXiv 2305.13245), in the interface of MLA."""

import torch
from torch import Tensor, nn

from dsv3_lightning.model.attention_kernels import Documents, causal_attention
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.rope import CosSin, apply_rope, softmax_scale
from dsv3_lightning.model.weight_grad import Linear


class GroupedQueryAttention(nn.Module):
    """x [B, T, D] -> [B, T, D]; H / `num_key_value_heads` queries share each key and value.

    H of them is multi-head attention, 1 is multi-query attention. The first `qk_nope_head_dim` channels of queries and
    keys do not rotate; the older family has none of these. Parameters are named as in its released checkpoints.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.num_key_value_heads is not None, "ModelConfig checks it"
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.nope_size, self.rope_size = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.scale = softmax_scale(config)
        self.interleave = config.rope_interleave
        hidden = config.hidden_size
        self.q_proj = Linear(hidden, self.heads * config.qk_head_dim)
        self.k_proj = Linear(hidden, self.kv_heads * config.qk_head_dim)
        self.v_proj = Linear(hidden, self.kv_heads * config.v_head_dim)
        self.o_proj = Linear(self.heads * config.v_head_dim, hidden)

    def forward(self, x_BTD: Tensor, rope: CosSin, documents: Documents | None = None) -> Tensor:
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, 1) for x in self.keys_values(x_BTD, rope))
        out_BHTC = causal_attention(self.queries(x_BTD, rope), k, v, self.scale, documents)
        return self.o_proj(out_BHTC.transpose(1, 2).flatten(2))

    def queries(self, x_BTD: Tensor, rope: CosSin) -> Tensor:
        """[B, H, T, nope + rope]."""
        return self.rotated(self.q_proj(x_BTD).unflatten(-1, (self.heads, -1)).transpose(1, 2), rope)

    def keys_values(self, x_BTD: Tensor, rope: CosSin) -> tuple[Tensor, Tensor]:
        """[B, num_key_value_heads, T, nope + rope] and [B, num_key_value_heads, T, v]: the contents of a cache."""
        k, v = (proj(x_BTD).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for proj in (self.k_proj, self.v_proj))
        return self.rotated(k, rope), v

    def rotated(self, x_BHTC: Tensor, rope: CosSin) -> Tensor:
        fixed, turning = x_BHTC.split((self.nope_size, self.rope_size), -1)
        return torch.cat((fixed, apply_rope(turning, rope, self.interleave)), -1)
