"""One Transformer layer: attention, then a dense or a mixture-of-experts feed-forward network, each with its norm."""

from torch import Tensor, nn

from dsv3_lightning.model.attention import MultiHeadLatentAttention
from dsv3_lightning.model.attention_kernels import Documents
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.grouped_query import GroupedQueryAttention
from dsv3_lightning.model.moe import DenseMLP, MoE, RouterStats
from dsv3_lightning.model.norm import RMSNorm
from dsv3_lightning.model.rope import CosSin

ATTENTION = {"mla": MultiHeadLatentAttention, "gqa": GroupedQueryAttention}


class Block(nn.Module):
    """x [B, T, D] -> ([B, T, D], RouterStats, or None from a dense layer). documents: see `causal_attention`."""

    def __init__(self, config: ModelConfig, dense: bool, balance: tuple[str, ...] = ("sequence",)) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = ATTENTION[config.attention](config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = DenseMLP(config.hidden_size, config.intermediate_size) if dense else MoE(config, balance)

    def forward(
        self, x_BTD: Tensor, rope: CosSin, mask_BT: Tensor, documents: Documents | None = None
    ) -> tuple[Tensor, RouterStats | None]:
        x_BTD = self.attend(x_BTD, rope, documents)
        out_BTD, stats = self.mlp(self.post_attention_layernorm(x_BTD), mask_BT)
        return x_BTD + out_BTD, stats

    def attend(self, x_BTD: Tensor, rope: CosSin, documents: Documents | None) -> Tensor:
        return x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope, documents)
