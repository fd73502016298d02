"""The model as a state that grows: tokens go in, the hidden states of the new ones come out."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.inference.cache import Cache, Step, attend
from dsv3_lightning.model.block import Block
from dsv3_lightning.model.experts import Experts
from dsv3_lightning.model.moe import MoE
from dsv3_lightning.model.mtp import MTPModule
from dsv3_lightning.model.rope import rotation
from dsv3_lightning.model.transformer import Transformer

FEW = 32  # slots: tokens times experts per token


class Decoder:
    """A model and the cache of `rows` texts, each up to `capacity` tokens.

    lengths: tokens in the cache of each row; lowering one forgets the tokens after it. mtp_lengths: the same of the MTP
    modules' caches, by module and row. A row never holds padding: rows go through the model with as many tokens as each
    other, and a prompt goes alone.
    """

    def __init__(self, model: Transformer, rows: int, capacity: int, mtp_depth: int = 0) -> None:
        self.model, self.config, self.capacity = model, model.config, capacity
        layers = self.config.num_hidden_layers + mtp_depth
        self.cache = Cache(self.config, layers, rows, capacity, model.embed_tokens.weight)
        self.rotations = rotation(self.config, torch.arange(capacity, device=self.device))
        self.lengths = [0] * rows
        self.mtp_lengths = [[0] * rows for _ in range(mtp_depth)]

    @property
    def device(self) -> torch.device:
        return self.cache.entries.device

    @torch.inference_mode()
    def extend(self, tokens_RT: Tensor, first: int = 0) -> Tensor:
        """The next T tokens of R rows from `first` on: their hidden states after the final norm, [R, T, D]."""
        step = self.step(self.lengths, first, tokens_RT.shape[1], len(tokens_RT))
        h_RTD = self.model.embed_tokens(tokens_RT)
        for block, entries_BSC in zip(self.model.layers, self.cache.entries):
            assert isinstance(block, Block)
            h_RTD = run_block(block, h_RTD, entries_BSC, step)
        return self.model.norm(h_RTD)

    @torch.inference_mode()
    def extend_mtp(self, k: int, h_RTD: Tensor, tokens_RT: Tensor, first: int = 0, only_last: bool = False) -> Tensor:
        """Module k (from 1) at the next T positions: from h_{k-1} there and the tokens k places on, h_k before its
        norm; of the last position alone where no other module needs the rest."""
        module, layer = self.model.mtp[k - 1], self.config.num_hidden_layers + k - 1
        assert isinstance(module, MTPModule)
        step = self.step(self.mtp_lengths[k - 1], first, tokens_RT.shape[1], len(tokens_RT))
        joined = torch.cat((module.enorm(self.model.embed_tokens(tokens_RT)), module.hnorm(h_RTD)), -1)
        return run_block(module.block, module.eh_proj(joined), self.cache.entries[layer], step, only_last)

    def step(self, lengths: list[int], first: int, T: int, rows: int) -> Step:
        assert max(lengths[first : first + rows]) + T <= self.capacity, "the cache is full"
        step = Step(self.rotations, first, lengths[first : first + rows], T)
        for row in range(first, first + rows):
            lengths[row] += T
        return step

    @torch.inference_mode()
    def logits(self, h_RTD: Tensor) -> Tensor:
        """fp32 [R, T, V]."""
        return self.model.lm_head(h_RTD).float()

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Row `source` takes the place of row `target`."""
        self.cache.move(source, target)
        for lengths in (self.lengths, *self.mtp_lengths):
            lengths[target] = lengths[source]


def run_block(block: Block, x_RTD: Tensor, entries_BSC: Tensor, step: Step, only_last: bool = False) -> Tensor:
    """A layer without what only training asks for."""
    seen_RTD = attend(block.self_attn, block.input_layernorm(x_RTD), entries_BSC, step, only_last)
    x_RTD = (x_RTD[:, -1:] if only_last else x_RTD) + seen_RTD
    u_RTD = block.post_attention_layernorm(x_RTD)
    if not isinstance(block.mlp, MoE):
        return x_RTD + block.mlp(u_RTD)
    moe, u_ND = block.mlp, u_RTD.flatten(0, 1)
    experts_NK, gates_NK, *_ = moe.gate(u_ND)
    if u_ND.device.type == "cpu" and experts_NK.numel() <= FEW:
        out_ND = few_slots(moe.experts, u_ND, experts_NK, gates_NK)
    else:
        out_ND = moe.experts(u_ND, experts_NK, gates_NK)
    if moe.shared_experts is not None:
        out_ND = out_ND + moe.shared_experts(u_ND)
    return x_RTD + out_ND.view_as(x_RTD)


def few_slots(experts: Experts, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor) -> Tensor:
    """What `experts` gives, a product per chosen expert: for few tokens torch's grouped product costs more on CPU."""
    K = experts_NK.shape[1]
    chosen, rows = experts_NK.flatten().tolist(), x_ND.split(1)
    gate_up_EDF, down_EFD = experts.gate_up_proj, experts.down_proj
    gate, up = torch.cat([rows[s // K] @ gate_up_EDF[e] for s, e in enumerate(chosen)]).chunk(2, -1)
    inner = (F.silu(gate) * up).split(1)
    y_SD = torch.cat([inner[s] @ down_EFD[e] for s, e in enumerate(chosen)])
    return (gates_NK[:, None].to(y_SD.dtype) @ y_SD.unflatten(0, (-1, K))).squeeze(1)


def check_lengths(lengths: list[int], max_new_tokens: int, limit: int) -> None:
    """Raises ConfigError for a prompt that is empty or too long, never cuts it."""
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens={max_new_tokens}: must be at least 0")
    if min(lengths) < 1:
        raise ConfigError("a prompt holds no token; start it with the begin token")
    if max(lengths) > limit:
        raise ConfigError(f"a prompt of {max(lengths)} tokens is longer than the context of {limit} tokens")
