"""One Transformer layer: attention, then a dense or a mixture-of-experts feed-forward network, each with its norm."""

from torch import Tensor, nn

from dsv3_lightning.model.attention import ATTENTION
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.moe import MLP, MoE, RouterStats
from dsv3_lightning.model.norm import RMSNorm
from dsv3_lightning.model.rope import Rotation


class Block(nn.Module):
    """x [B, T, D] -> ([B, T, D], RouterStats, or None from a dense layer). seen_B1TT: see `causal_attention`."""

    def __init__(self, config: ModelConfig, dense: bool, balance: tuple[str, ...] = ("sequence",)) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = ATTENTION[config.attention](config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size) if dense else MoE(config, balance)

    def forward(
        self, x_BTD: Tensor, at: Rotation, mask_BT: Tensor, seen_B1TT: Tensor | None = None
    ) -> tuple[Tensor, RouterStats | None]:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), at, seen_B1TT)
        u_BTD = self.post_attention_layernorm(x_BTD)
        if isinstance(self.mlp, MoE):
            out_BTD, stats = self.mlp(u_BTD, mask_BT)
            return x_BTD + out_BTD, stats
        return x_BTD + self.mlp(u_BTD), None
