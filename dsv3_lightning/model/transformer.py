"""The whole model: embedding, blocks, head, and the MTP modules that share both ends with it (V3 figure 2 and 3)."""

import functools
import hashlib
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from dsv3_lightning.model.attention import own_document
from dsv3_lightning.model.block import Block
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.losses import linear_cross_entropy
from dsv3_lightning.model.moe import RouterStats
from dsv3_lightning.model.mtp import MTP_KINDS, MTPModule, ParallelHead
from dsv3_lightning.model.norm import RMSNorm
from dsv3_lightning.model.rope import rotation


class Losses(NamedTuple):
    """nll_K: sums of token losses, fp32 [1 + mtp_depth], main head first; empty where no targets were given.

    balance: by name, without α, fp32: the loss of each MoE layer [L], or for those of the whole batch what
    `balance.batch_loss` takes [L, E]. counts_LE: tokens per expert, int64.
    guesses_BKT: each head's greedy choice, int64, where they were asked for.
    """

    nll_K: Tensor
    balance: dict[str, Tensor]
    counts_LE: Tensor
    guesses_BKT: Tensor | None = None


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

    def forward(self, h_BTD: Tensor) -> Tensor:
        return F.linear(h_BTD, self.weight.to(h_BTD.dtype))  # sharded and tied to the embedding it is wider in bf16

    def loss(self, h_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Summed cross-entropy of the targets that aren't IGNORE, fp32."""
        return linear_cross_entropy(h_BTD.flatten(0, 1), self.weight, targets_BT.flatten())

    @torch.no_grad()
    def greedy(self, h_BTD: Tensor) -> Tensor:
        """The most likely next token of every position, int64 [B, T]."""
        chunk = max(1, 2**24 // self.out_features)  # logits of so many tokens at a time
        rows = h_BTD.flatten(0, 1).split(chunk)
        # on a CPU argmax of bf16 takes six times as long as max, which finds the same place
        return torch.cat([self(h_ND).max(-1).indices for h_ND in rows]).view(h_BTD.shape[:2])


class Transformer(nn.Module):
    """Parameters are named as in the released checkpoint, experts stacked, MTP modules apart in `mtp`.

    balance: names of the balance losses that `losses` makes.
    """

    def __init__(
        self,
        config: ModelConfig,
        activation_checkpointing: str = "none",
        balance: tuple[str, ...] = ("sequence",),
    ) -> None:
        super().__init__()
        self.config = config
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
        """Makes the head the embedding, where the config says so; also after `to_empty`, which makes two of one."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens_BT: Tensor, positions_B: Tensor | None = None) -> Tensor:
        """Logits of the main model for every position: [B, T, V]; or for one position of each row: [B, V]."""
        h_BTD, _ = self.trunk(tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool))
        if positions_B is not None:
            return self.lm_head(h_BTD[torch.arange(len(h_BTD), device=h_BTD.device), positions_B])
        return self.lm_head(h_BTD)

    def trunk(
        self, tokens_BT: Tensor, mask_BT: Tensor, seen_B1TT: Tensor | None = None
    ) -> tuple[Tensor, list[RouterStats]]:
        """The main model up to its final norm: [B, T, D], and the stats of its MoE layers."""
        at = rotation(self.config, torch.arange(tokens_BT.shape[1], device=tokens_BT.device))
        h_BTD = self.embed_tokens(tokens_BT)
        stats = []
        for block in self.layers:
            h_BTD, layer_stats = self.recompute(block, h_BTD, at, mask_BT, seen_B1TT)
            if layer_stats is not None:
                stats.append(layer_stats)
        return self.norm(h_BTD), stats

    def losses(
        self,
        tokens_BS: Tensor,
        mask_BS: Tensor,
        targets_BKT: Tensor | None,
        guess: bool = False,
        documents_BS: Tensor | None = None,
    ) -> Losses:
        """The losses of S = T + 1 + mtp_depth tokens per sample.

        mask_BS: bool, False on padding. targets_BKT: int64, [:, k, i] is token i + 1 + k or IGNORE; k = 0 is the main
        head; None: only the routing is wanted. guess: whether the heads' greedy choices are, too.
        documents_BS: int64, the number of each token's document, where those of a sample don't see each other.
        Module k starts from h_{k-1}, where h_0 is the main model's output after its final norm, as the inference
        engines of the released weights do (eq. 21-25); a parallel head from h_0.
        """
        T = tokens_BS.shape[1] - 1 - self.config.mtp_depth if targets_BKT is None else targets_BKT.shape[-1]
        # Module k's place i also knows token i + k. Where that is another document's already, no place of its own
        # document comes after it, so only what it predicts itself, which is no target, can tell.
        seen_B1TT = None if documents_BS is None else own_document(documents_BS[:, :T])
        h_BTD, stats = self.trunk(tokens_BS[:, :T], mask_BS[:, :T], seen_B1TT)
        heads = [h_BTD]  # what the output head gets
        at = rotation(self.config, torch.arange(T, device=tokens_BS.device))
        for k, module in enumerate(self.mtp, start=1):
            if isinstance(module, ParallelHead):
                h_BTD, layer_stats = self.recompute(module, heads[0], at, mask_BS[:, :T], seen_B1TT)
            else:
                embedding_BTD = self.embed_tokens(tokens_BS[:, k : k + T])
                mask_BT = mask_BS[:, k : k + T]
                h_BTD, layer_stats = self.recompute(module, h_BTD, embedding_BTD, at, mask_BT, seen_B1TT)
            stats.append(layer_stats)
            heads.append(cast(MTPModule, module).norm(h_BTD))
        nll_K = torch.zeros(0, device=h_BTD.device)
        if targets_BKT is not None:
            nll_K = torch.stack([self.lm_head.loss(h, targets_BKT[:, k]) for k, h in enumerate(heads)])
        guesses_BKT = torch.stack([self.lm_head.greedy(h) for h in heads], 1) if guess else None
        return Losses(nll_K, *stack_stats(stats, self.config.n_routed_experts, h_BTD.device), guesses_BKT)

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


def stack_stats(stats: list[RouterStats], num_experts: int, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """balance and counts_LE of all MoE layers; none, and of zero rows, where there is none."""
    if not stats:
        return {}, torch.zeros(0, num_experts, dtype=torch.int64, device=device)
    balance = {name: torch.stack([layer.balance[name] for layer in stats]) for name in stats[0].balance}
    return balance, torch.stack([layer.counts_E for layer in stats])


def keep_all(module: Callable, *args):
    return module(*args)


def recompute_all(module: Callable, *args):
    return checkpoint(module, *args, use_reentrant=False)


def recompute_cheap(module: Callable, *args):
    """Keeps what attention and the large matrix products made; norms, activations and rotations are made again."""
    return checkpoint(module, *args, use_reentrant=False, context_fn=products_contexts)


def products_contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """For the first pass, which keeps the products, and for the second, which finds them."""
    first, second = create_selective_checkpoint_contexts(lambda *_args, **_kwargs: CheckpointPolicy.MUST_SAVE)
    return OnProducts(first), OnProducts(second)


class OnProducts(TorchDispatchMode):
    """Another mode, for the operations in PRODUCTS alone.

    It counts operations, and the two passes have unequal numbers of others where parameters are gathered on the way.
    """

    def __init__(self, mode: TorchDispatchMode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS:
            return self.mode.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


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
