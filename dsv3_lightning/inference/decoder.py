"""Incremental decoding: a model with its cache, which takes tokens and returns their hidden states."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.inference.cache import Cache, Step
from dsv3_lightning.inference.int8 import Int8, int8_feed_forward
from dsv3_lightning.inference.layers import DraftModule, Layer, Norm
from dsv3_lightning.inference.single import Scale, SingleDraft, SingleLayer, fits
from dsv3_lightning.model.block import Block
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.rope import cos_sin
from dsv3_lightning.model.transformer import Transformer


class Decoder:
    """A model and the cache of `rows` texts, each up to `capacity` tokens.

    lengths: tokens in the cache of each row; lowering a length drops the tokens after it. mtp_lengths: the same for the
    MTP modules' caches, by module and row. Rows never contain padding: a forward pass has equally many new tokens in
    each row, and prompts are separate passes. lower: the settings to name in the ConfigError for insufficient memory.
    unused: ids that no token has; their logits are -inf, also those of MTP modules, so none is ever drawn.
    weights: `int8` for single tokens of one text on a CPU, see int8.py. Raises ConfigError where that can't be.
    """

    def __init__(
        self,
        model: Transformer,
        rows: int,
        capacity: int,
        mtp_depth: int = 0,
        lower: str = "the number of texts, or their length",
        unused: Sequence[int] = (),
        weights: str = "fp32",
    ) -> None:
        self.model, self.config, self.capacity = model, model.config, capacity
        layers = self.config.num_hidden_layers + mtp_depth
        self.cache = Cache(self.config, layers, rows, capacity, model.embed_tokens.weight, lower)
        self.entries = self.cache.entries.unbind()
        self.rotations = cos_sin(self.config, torch.arange(capacity, device=self.device))
        with torch.no_grad():
            self.layers, self.norm = [Layer(block) for block in model.layers], Norm(model.norm)
            self.draft_modules = [DraftModule(module) for module in model.mtp[:mtp_depth]]
            self.single = rows == 1 and fits(model)
            if self.single:
                self.single_layers = [SingleLayer(block) for block in model.layers]
                self.single_drafts = [SingleDraft(module) for module in model.mtp[:mtp_depth]]
                self.single_norm = Scale(model.norm)
                self.turns = [both.repeat(1, 2).unbind() for both in self.rotations]  # cos and sin by position, [rope]
            self.int8_head: Int8 | None = None
            if weights == "int8":
                self.use_int8()
        self.unused = torch.tensor(unused, dtype=torch.int64, device=self.device)
        self.lengths = [0] * rows
        self.mtp_lengths = [[0] * rows for _ in range(mtp_depth)]

    def use_int8(self) -> None:
        if not self.single:
            raise ConfigError("--weights int8: is for one text at a time, of a model with MLA in fp32 on a CPU")
        for layer, block in zip(self.single_layers, self.model.layers):
            layer.mlp = int8_feed_forward(cast(Block, block).mlp)
        self.int8_head = Int8(self.model.lm_head.weight)

    @property
    def device(self) -> torch.device:
        return self.cache.entries.device

    @torch.inference_mode()
    def extend(self, tokens_BT: Tensor, first: int = 0) -> Tensor:
        """Appends T tokens to each of B rows from `first` on; returns hidden states after the final norm, [B, T, D]."""
        if self.single and tokens_BT.shape[1] == 1:
            return self.extend_one(int(tokens_BT))
        step = self.step(self.lengths, first, tokens_BT.shape[1], len(tokens_BT))
        h_BTD = self.model.embed_tokens(tokens_BT)
        for layer, entries_BUC in zip(self.layers, self.entries):
            h_BTD = layer(h_BTD, entries_BUC, step)
        return self.norm(h_BTD)

    def extend_one(self, token: int) -> Tensor:
        """`extend` by one token of a single text."""
        place = self.take_place(self.lengths)
        cos, sin = self.turns[0][place], self.turns[1][place]
        x_D = self.model.embed_tokens.weight[token].clone()
        for layer, entries_BUC in zip(self.single_layers, self.entries):
            layer(x_D, entries_BUC[0], place, cos, sin)
        return self.single_norm(x_D, torch.empty_like(x_D))[None, None]

    def take_place(self, lengths: list[int]) -> int:
        """The next position of a single text."""
        assert lengths[0] < self.capacity, "the cache is full"
        lengths[0] += 1
        return lengths[0] - 1

    @torch.inference_mode()
    def extend_mtp(self, k: int, h_BTD: Tensor, tokens_BT: Tensor, first: int = 0, only_last: bool = False) -> Tensor:
        """Runs MTP module k (from 1) at the next T positions, with h_{k-1} there and the tokens k positions ahead.

        Returns h_k before its norm, [B, T, D]. only_last: of the last position, if no other module needs the rest.
        """
        entries_BUC = self.entries[len(self.layers) + k - 1]
        if self.single and tokens_BT.shape[1] == 1:
            place = self.take_place(self.mtp_lengths[k - 1])
            embedding_D = self.model.embed_tokens.weight[int(tokens_BT)]
            turn = self.turns[0][place], self.turns[1][place]
            return self.single_drafts[k - 1](embedding_D, h_BTD[0, 0], entries_BUC[0], place, *turn)[None, None]
        step = self.step(self.mtp_lengths[k - 1], first, tokens_BT.shape[1], len(tokens_BT))
        return self.draft_modules[k - 1](self.model.embed_tokens(tokens_BT), h_BTD, entries_BUC, step, only_last)

    def step(self, lengths: list[int], first: int, T: int, rows: int) -> Step:
        assert max(lengths[first : first + rows]) + T <= self.capacity, "the cache is full"
        step = Step(self.rotations, first, lengths[first : first + rows], T)
        for row in range(first, first + rows):
            lengths[row] += T
        return step

    @torch.inference_mode()
    def logits(self, h_BTD: Tensor, k: int = 0) -> Tensor:
        """Logits, fp32 [B, T, V], from the hidden states of `extend` or, for k above 0, `extend_mtp` of module k."""
        return without(self.head(self.draft_modules[k - 1].norm(h_BTD) if k else h_BTD), self.unused)

    @torch.inference_mode()
    def head(self, h_BTD: Tensor) -> Tensor:
        """The output head alone: fp32 [B, T, V], unused ids included."""
        if self.int8_head is not None and h_BTD.shape[-2] == 1:
            return self.int8_head(h_BTD.flatten(0, -2).bfloat16()).float().view(*h_BTD.shape[:-1], -1)
        return F.linear(h_BTD, self.model.lm_head.weight).float()

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Overwrites row `target` by row `source`."""
        self.cache.move(source, target)
        for lengths in (self.lengths, *self.mtp_lengths):
            lengths[target] = lengths[source]


def without(logits_V: Tensor, unused: Tensor) -> Tensor:
    """Sets the logits [..., V] of unused ids (int64 [n]) to -inf, in place."""
    return logits_V.index_fill_(-1, unused, -torch.inf) if len(unused) else logits_V


def context_of(config: ModelConfig, wanted: int | None) -> int:
    """The context length: `--context`, or the model's limit. Raises ConfigError."""
    most = config.max_position_embeddings
    if wanted is not None and not 1 <= wanted <= most:
        raise ConfigError(f"--context {wanted}: must be between 1 and {most}, the model's max_position_embeddings")
    return most if wanted is None else wanted


def check_lengths(lengths: list[int], max_new_tokens: int, limit: int) -> None:
    """Raises ConfigError for a prompt that is empty or too long; prompts are never truncated."""
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens={max_new_tokens}: must be at least 0")
    if min(lengths) < 1:
        raise ConfigError("a prompt has no tokens; start it with the begin token")
    if max(lengths) > limit:
        raise ConfigError(f"a prompt of {max(lengths)} tokens is longer than the context of {limit} tokens")
