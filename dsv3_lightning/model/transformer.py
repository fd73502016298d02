"""The whole model: embedding, blocks, head, and the MTP modules that share both ends with it (V3 figure 2 and 3)."""

import functools
import hashlib
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from dsv3_lightning.model.block import Block
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.losses import linear_cross_entropy
from dsv3_lightning.model.moe import RouterStats
from dsv3_lightning.model.mtp import MTPModule
from dsv3_lightning.model.norm import RMSNorm
from dsv3_lightning.model.rope import rotation


class Losses(NamedTuple):
    """nll_K: sums of token losses, fp32 [1 + mtp_depth], main head first.

    balance_L: sequence-wise balance loss of each MoE layer, without α, fp32. counts_LE: tokens per expert, int64.
    """

    nll_K: Tensor
    balance_L: Tensor
    counts_LE: Tensor


def normal(shape: torch.Size, std: float, key: str, device: torch.device) -> Tensor:
    """Normal numbers, fp32, from the random stream of that key."""
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(shape, device=device).normal_(std=std, generator=generator)


def fill(parameter: Tensor, expert: int | None, draw: Callable[[], Tensor]) -> None:
    """Writes a matrix into a parameter that is wholly here."""
    (parameter if expert is None else parameter[expert]).copy_(draw())


class OutputHead(nn.Linear):
    """h [B, T, D] -> logits [B, T, V]; `loss` never makes them all."""

    def loss(self, h_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Summed cross-entropy of the targets that aren't IGNORE, fp32."""
        return linear_cross_entropy(h_BTD.flatten(0, 1), self.weight, targets_BT.flatten())


class Transformer(nn.Module):
    """Parameters are named as in the released checkpoint, experts stacked, MTP modules apart in `mtp`."""

    def __init__(self, config: ModelConfig, activation_checkpointing: str = "none") -> None:
        super().__init__()
        self.config = config
        self.recompute = RECOMPUTE[activation_checkpointing]
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, dense=i < config.first_k_dense_replace) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = OutputHead(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = nn.ModuleList(MTPModule(config) for _ in range(config.mtp_depth))
        self.tie_weights()

    def tie_weights(self) -> None:
        """Makes the head the embedding, where the config says so; also after `to_empty`, which makes two of one."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits of the main model for every position: [B, T, V]."""
        return self.lm_head(self.trunk(tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool))[0])

    def trunk(self, tokens_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, list[RouterStats]]:
        """The main model up to its final norm: [B, T, D], and the stats of its MoE layers."""
        at = rotation(self.config, torch.arange(tokens_BT.shape[1], device=tokens_BT.device))
        h_BTD = self.embed_tokens(tokens_BT)
        stats = []
        for block in self.layers:
            h_BTD, layer_stats = self.recompute(block, h_BTD, at, mask_BT)
            if layer_stats is not None:
                stats.append(layer_stats)
        return self.norm(h_BTD), stats

    def losses(self, tokens_BS: Tensor, mask_BS: Tensor, targets_BKT: Tensor) -> Losses:
        """The losses of S = T + 1 + mtp_depth tokens per sample.

        mask_BS: bool, False on padding. targets_BKT: int64, [:, k, i] is token i + 1 + k or IGNORE; k = 0 is the main
        head. Module k starts from h_{k-1}, where h_0 is the main model's output after its final norm, as the inference
        engines of the released weights do (eq. 21-25).
        """
        T = targets_BKT.shape[-1]
        h_BTD, stats = self.trunk(tokens_BS[:, :T], mask_BS[:, :T])
        nll = [self.lm_head.loss(h_BTD, targets_BKT[:, 0])]
        at = rotation(self.config, torch.arange(T, device=tokens_BS.device))
        for k, module in enumerate(self.mtp, start=1):
            embedding_BTD = self.embed_tokens(tokens_BS[:, k : k + T])
            h_BTD, layer_stats = self.recompute(module, h_BTD, embedding_BTD, at, mask_BS[:, k : k + T])
            stats.append(layer_stats)
            nll.append(self.lm_head.loss(cast(MTPModule, module).norm(h_BTD), targets_BKT[:, k]))
        return Losses(torch.stack(nll), *stack_stats(stats, self.config.n_routed_experts, h_BTD.device))

    @torch.no_grad()
    def init_weights(self, seed: int, place: Callable[[Tensor, int | None, Callable[[], Tensor]], None] = fill) -> None:
        """Matrices normal with `initializer_range` (V3 §4.2), norms 1, expert biases 0.

        Each matrix has a random stream of its own, keyed by seed, name and, in stacked weights, expert: adding a
        module, a layer or an expert leaves the others' initial weights as they are, and a process that holds a few of
        them draws only these. place(parameter, expert, draw) writes what draw() gives to where it belongs.
        """
        self.tie_weights()
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
                continue
            for expert in range(parameter.shape[0]) if parameter.dim() == 3 else (None,):
                key = f"{seed}/{name}" if expert is None else f"{seed}/{name}/{expert}"
                shape, std = parameter.shape[-2:], self.config.initializer_range
                place(parameter, expert, functools.partial(normal, shape, std, key, parameter.device))
        for buffer in self.buffers():
            nn.init.zeros_(buffer)


def stack_stats(stats: list[RouterStats], num_experts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """balance_L and counts_LE of all MoE layers; of zero rows where there is none."""
    if not stats:
        return torch.zeros(0, device=device), torch.zeros(0, num_experts, dtype=torch.int64, device=device)
    return torch.stack([s.balance for s in stats]), torch.stack([s.counts_E for s in stats])


def keep_all(module: Callable, *args):
    return module(*args)


def recompute_all(module: Callable, *args):
    return checkpoint(module, *args, use_reentrant=False)


def recompute_cheap(module: Callable, *args):
    """Keeps what attention and the large matrix products made; norms, activations and rotations are made again."""
    contexts = functools.partial(create_selective_checkpoint_contexts, keep_products)
    return checkpoint(module, *args, use_reentrant=False, context_fn=contexts)


def keep_products(_context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


RECOMPUTE = {"none": keep_all, "selective": recompute_cheap, "full": recompute_all}
PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten.topk.default,  # choices must not differ between the two passes
}
