"""Parallel prediction heads (arXiv 2404.19737), for ablations: head k predicts token i + k + 1 from the trunk alone."""

from torch import Tensor, nn

from dsv3_lightning.model.attention_kernels import Documents
from dsv3_lightning.model.block import Block
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.moe import RouterStats
from dsv3_lightning.model.mtp import Inputs
from dsv3_lightning.model.norm import RMSNorm
from dsv3_lightning.model.rope import CosSin


class ParallelHead(nn.Module):
    """One head of arXiv 2404.19737 §2: a block on the trunk's output, then the output head shared by all."""

    sees_tokens_between = False

    def __init__(self, config: ModelConfig, balance: tuple[str, ...] = ("sequence",)) -> None:
        super().__init__()
        self.block = Block(config, dense=False, balance=balance)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def inputs(self, k: int, trunk_BTD: Tensor, h_BTD: Tensor, embedding_BSD: Tensor, mask_BS: Tensor) -> Inputs:
        """h_0 for every k, no embeddings, and the trunk's own mask."""
        return trunk_BTD, None, mask_BS[:, : h_BTD.shape[1]]

    def forward(
        self, h_BTD: Tensor, embedding_BTD: None, rope: CosSin, mask_BT: Tensor, documents: Documents | None = None
    ) -> tuple[Tensor, RouterStats]:
        """The head's output [B, T, D], before `norm` and the output head."""
        return self.block(h_BTD, rope, mask_BT, documents)
