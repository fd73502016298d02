"""Multi-token prediction (V3 §2.2, eq. 21-23): module k predicts token i + k + 1 from h_{k-1} at i and token i + k."""

import torch
from torch import Tensor, nn

from dsv3_lightning.model.attention_kernels import Documents
from dsv3_lightning.model.block import Block
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.moe import RouterStats
from dsv3_lightning.model.norm import RMSNorm
from dsv3_lightning.model.rope import CosSin
from dsv3_lightning.model.weight_grad import Linear

Inputs = tuple[Tensor, Tensor | None, Tensor]


class MTPModule(nn.Module):
    """One depth of V3's multi-token prediction. It shares the embedding and the output head of the main model.

    As in the released weights (the paper has the other order), `eh_proj` takes the embedding half first.
    """

    sees_tokens_between = True  # module k's positions also know the tokens up to k positions on

    def __init__(self, config: ModelConfig, balance: tuple[str, ...] = ("sequence",)) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.block = Block(config, dense=False, balance=balance)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def inputs(self, k: int, trunk_BTD: Tensor, h_BTD: Tensor, embedding_BSD: Tensor, mask_BS: Tensor) -> Inputs:
        """h_{k-1}, the embeddings of the tokens k positions on, and their mask."""
        ahead = slice(k, k + h_BTD.shape[1])
        return h_BTD, embedding_BSD[:, ahead], mask_BS[:, ahead]

    def forward(
        self, h_BTD: Tensor, embedding_BTD: Tensor, rope: CosSin, mask_BT: Tensor,
        documents: Documents | None = None,
    ) -> tuple[Tensor, RouterStats]:  # fmt: skip
        """h_k [B, T, D], before `norm` and the output head."""
        joined = torch.cat((self.enorm(embedding_BTD), self.hnorm(h_BTD)), -1)
        return self.block(self.eh_proj(joined), rope, mask_BT, documents)  # eq. 21, 22
