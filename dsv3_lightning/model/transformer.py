"""The whole model: embedding, blocks, head, and the MTP modules that share both ends with it (V3 figure 2 and 3)."""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from dsv3_lightning.model.attention_kernels import Documents, find_documents
from dsv3_lightning.model.block import Block
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.head import OutputHead, Weigh
from dsv3_lightning.model.init import Fill, fill, init_weights
from dsv3_lightning.model.moe import RouterStats
from dsv3_lightning.model.mtp import MTPModule
from dsv3_lightning.model.norm import RMSNorm
from dsv3_lightning.model.parallel_heads import ParallelHead
from dsv3_lightning.model.recompute import RECOMPUTE
from dsv3_lightning.model.rope import cos_sin
from dsv3_lightning.model.scores import most_likely, token_scores

MTP_KINDS: dict[str, type[MTPModule | ParallelHead]] = {"sequential": MTPModule, "parallel": ParallelHead}


class Losses(NamedTuple):
    """nll_P: sums of token losses, fp32 [1 + mtp_depth], main head first; empty where no targets were given.

    balance: by name, without α, fp32: the loss of each MoE layer [L], or for those of the whole batch the sums that
    `balance.batch_loss` takes [L, E]. counts_LE: tokens per expert, int64.
    drafts_BPT: the most likely token by each head, int64, where they were asked for.
    """

    nll_P: Tensor
    balance: dict[str, Tensor]
    counts_LE: Tensor
    drafts_BPT: Tensor | None = None


class Transformer(nn.Module):
    """Parameters are named as in the released checkpoint, experts stacked, MTP modules apart in `mtp`.

    balance: the names of the balance losses that `losses` computes.
    """

    def __init__(
        self,
        config: ModelConfig,
        activation_checkpointing: str = "none",
        balance: tuple[str, ...] = ("sequence",),
    ) -> None:
        super().__init__()
        self.config, self.balance = config, balance
        self.recompute = RECOMPUTE[activation_checkpointing]
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, i < config.first_k_dense_replace, balance) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = OutputHead(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = nn.ModuleList(MTP_KINDS[config.mtp_kind](config, balance) for _ in range(config.mtp_depth))
        self.tie_weights()

    def tie_weights(self) -> None:
        """Makes the head's weight the embedding's, where the config says so. Needed again after `to_empty`, which
        separates them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens_BT: Tensor, positions_B: Tensor | None = None) -> Tensor:
        """Logits of the main model for every position: [B, T, V]; or for one position of each row: [B, V]."""
        h_BTD, _ = self.trunk(self.embed_tokens(tokens_BT), torch.ones_like(tokens_BT, dtype=torch.bool))
        if positions_B is not None:
            return self.lm_head(h_BTD[torch.arange(len(h_BTD), device=h_BTD.device), positions_B])
        return self.lm_head(h_BTD)

    def trunk(
        self, h_BTD: Tensor, mask_BT: Tensor, documents: Documents | None = None
    ) -> tuple[Tensor, list[RouterStats]]:
        """The main model from the embeddings to its final norm: [B, T, D], and the stats of its MoE layers."""
        h_BTD, stats = self.through_layers(h_BTD, mask_BT, documents)
        return self.norm(h_BTD), stats

    def through_layers(
        self, h_BTD: Tensor, mask_BT: Tensor, documents: Documents | None
    ) -> tuple[Tensor, list[RouterStats]]:
        """h [B, T, D] after the layers, and the stats of those that are MoE layers."""
        rope = cos_sin(self.config, torch.arange(h_BTD.shape[1], device=h_BTD.device))
        stats = []
        for block in self.layers:
            h_BTD, layer_stats = self.recompute(block, h_BTD, rope, mask_BT, documents)
            if layer_stats is not None:
                stats.append(layer_stats)
        return h_BTD, stats

    def head_inputs(
        self, trunk_BTD: Tensor, embedding_BSD: Tensor, mask_BS: Tensor, documents: Documents | None
    ) -> tuple[list[Tensor], list[RouterStats]]:
        """What the output head takes for each of the P losses, [B, T, D], and the stats of the MTP modules.

        Module k starts from h_{k-1}, where h_0 is the main model's output after its final norm (eq. 21-25); a parallel
        head from h_0.
        """
        rope = cos_sin(self.config, torch.arange(trunk_BTD.shape[1], device=trunk_BTD.device))
        h_BTD, inputs, stats = trunk_BTD, [trunk_BTD], []
        for k, module in enumerate(cast(list[MTPModule], self.mtp), start=1):
            h_BTD, embedding_BTD, mask_BT = module.inputs(k, trunk_BTD, h_BTD, embedding_BSD, mask_BS)
            h_BTD, layer_stats = self.recompute(module, h_BTD, embedding_BTD, rope, mask_BT, documents)
            stats.append(layer_stats)
            inputs.append(module.norm(h_BTD))
        return inputs, stats

    def losses(
        self,
        tokens_BS: Tensor,
        mask_BS: Tensor,
        targets_BPT: Tensor | None,
        draft: bool = False,
        documents_BS: Tensor | None = None,
        weigh: Weigh | None = None,
    ) -> Losses:
        """The losses of samples of S = T + 1 + mtp_depth tokens.

        mask_BS: bool, False on padding. targets_BPT: int64, [:, p, i] is token i + 1 + p or IGNORE; p = 0 is the main
        head; None computes the routing alone. draft: whether to return each head's most likely token, too.
        documents_BS: int64, the number of each token's document, where documents of a sample do not see each other;
        best on the host (see `find_documents`).
        weigh: the weights of the main head's tokens (see `OutputHead.loss`). The MTP modules then learn from the main
        model and change nothing in it.
        """
        T = tokens_BS.shape[1] - 1 - self.config.mtp_depth if targets_BPT is None else targets_BPT.shape[-1]
        # At a document's end, module k sees a token of the next document. Only that position's own prediction is
        # affected, and it has no target.
        documents = None if documents_BS is None else find_documents(documents_BS[:, :T], tokens_BS.device)
        embedding_BSD = self.embed_tokens(tokens_BS)  # once, also for the MTP modules: where sharded, it is gathered
        trunk_BTD, stats = self.trunk(embedding_BSD[:, :T], mask_BS[:, :T], documents)
        apart = (trunk_BTD, embedding_BSD) if weigh is None else (trunk_BTD.detach(), embedding_BSD.detach())
        inputs, more = self.head_inputs(*apart, mask_BS, documents)
        nll_P = torch.zeros(0, device=trunk_BTD.device)
        if targets_BPT is not None:
            nll_P = self.lm_head.loss([trunk_BTD, *inputs[1:]], targets_BPT, weigh)
        drafts_BPT = (
            torch.stack([most_likely(self.lm_head, h, self.config.vocab_size) for h in inputs], 1) if draft else None
        )
        return Losses(nll_P, *stack_stats([*stats, *more], self.config.n_routed_experts, nll_P.device), drafts_BPT)

    token_scores = token_scores

    def init_weights(self, seed: int, fill_parameter: Fill = fill) -> None:
        """Matrices normal with `initializer_range` (V3 §4.2), norms 1, expert biases 0; see `init.init_weights`."""
        self.tie_weights()
        init_weights(self, self.config.initializer_range, seed, fill_parameter)


def stack_stats(stats: list[RouterStats], num_experts: int, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """balance and counts_LE of all MoE layers; a dense model has no balance losses, and counts of zero layers."""
    if not stats:
        return {}, torch.zeros(0, num_experts, dtype=torch.int64, device=device)
    balance = {name: torch.stack([layer.balance[name] for layer in stats]) for name in stats[0].balance}
    return balance, torch.stack([layer.counts_E for layer in stats])
