"""Multi-token prediction (V3 §2.2, eq. 21-23): module k guesses token i + k + 1 from h at i and token i + k.

Beside it, for ablations, the independent heads of arXiv 2404.19737: head k guesses that token from the trunk alone.
"""

import torch
from torch import Tensor, nn

from dsv3_lightning.model.block import Block
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.moe import RouterStats
from dsv3_lightning.model.norm import RMSNorm
from dsv3_lightning.model.rope import Rotation


class MTPModule(nn.Module):
    """One depth. Embedding and output head are the main model's own and are not held here.

    As in the released weights (the paper's order is the other way round), `eh_proj` takes the embedding half first.
    """

    def __init__(self, config: ModelConfig, balance: tuple[str, ...] = ("sequence",)) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = Block(config, dense=False, balance=balance)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, h_BTD: Tensor, embedding_BTD: Tensor, at: Rotation, mask_BT: Tensor, seen_B1TT: Tensor | None = None
    ) -> tuple[Tensor, RouterStats]:
        """h_{k-1} and the embeddings of the tokens k places on -> h_k [B, T, D], before `norm` and the head."""
        joined = torch.cat((self.enorm(embedding_BTD), self.hnorm(h_BTD)), -1)
        return self.block(self.eh_proj(joined), at, mask_BT, seen_B1TT)  # eq. 21, 22


class ParallelHead(nn.Module):
    """One head of arXiv 2404.19737 §2: a block on the trunk's output, then the output head shared by all."""

    def __init__(self, config: ModelConfig, balance: tuple[str, ...] = ("sequence",)) -> None:
        super().__init__()
        self.block = Block(config, dense=False, balance=balance)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, h_BTD: Tensor, at: Rotation, mask_BT: Tensor, seen_B1TT: Tensor | None = None
    ) -> tuple[Tensor, RouterStats]:
        """The main model's output after its final norm -> [B, T, D], before `norm` and the head."""
        return self.block(h_BTD, at, mask_BT, seen_B1TT)


MTP_KINDS = {"sequential": MTPModule, "parallel": ParallelHead}
