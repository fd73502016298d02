"""Mapping between tensors of a released checkpoint and our parameters (README_WEIGHTS.md of the released weights).

On disk every expert has separate matrices, [out, in]; ours are stacked, [E, in, out], with gate and up joined. MTP
module k is layer num_hidden_layers + k - 1 and has copies of embedding and head. Rotary channels are neighboring pairs,
or halves in Llama's layout; for a model that computes with the other order, rows are permuted.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3_lightning.model.config import ModelConfig

MLP = ("gate_proj", "up_proj", "down_proj")
BIAS = "e_score_correction_bias"


class Stored(NamedTuple):
    """The tensor `key` on disk, made of our parameter or buffer `name`.

    expert: the index in a stacked parameter. half: 0 for gate and 1 for up, which are joined in ours.
    heads: the number of heads whose channels are its rows, the last of each being rotary; 0: none is rotary.
    copy: a duplicate of another key. written: True if exports contain it.
    """

    key: str
    name: str
    expert: int | None = None
    half: int | None = None
    heads: int = 0
    copy: bool = False
    written: bool = True


def layout(config: ModelConfig) -> Iterator[Stored]:
    """All tensors of the model on disk, in the order of the files."""
    yield Stored("model.embed_tokens.weight", "embed_tokens.weight")
    for i in range(config.num_hidden_layers):
        yield from block(config, f"model.layers.{i}.", f"layers.{i}.", dense=i < config.first_k_dense_replace)
    yield Stored("model.norm.weight", "norm.weight")
    tied = config.tie_word_embeddings
    head = "embed_tokens.weight" if tied else "lm_head.weight"
    yield Stored("lm_head.weight", head, copy=tied, written=not tied)
    for k in range(config.mtp_depth):
        there, here = f"model.layers.{config.num_hidden_layers + k}.", f"mtp.{k}."
        yield Stored(f"{there}embed_tokens.weight", "embed_tokens.weight", copy=True)
        for name in ("enorm", "hnorm", "eh_proj"):
            yield Stored(f"{there}{name}.weight", f"{here}{name}.weight")
        yield from block(config, there, f"{here}block.", dense=False)
        yield Stored(f"{there}shared_head.norm.weight", f"{here}norm.weight")
        yield Stored(f"{there}shared_head.head.weight", head, copy=True)


def block(config: ModelConfig, there: str, here: str, dense: bool) -> Iterator[Stored]:
    yield Stored(f"{there}input_layernorm.weight", f"{here}input_layernorm.weight")
    for name, heads in attention(config).items():
        yield Stored(f"{there}self_attn.{name}.weight", f"{here}self_attn.{name}.weight", heads=heads)
    yield Stored(f"{there}post_attention_layernorm.weight", f"{here}post_attention_layernorm.weight")
    if dense:
        yield from (Stored(f"{there}mlp.{name}.weight", f"{here}mlp.{name}.weight") for name in MLP)
        return
    yield Stored(f"{there}mlp.gate.weight", f"{here}mlp.gate.weight")
    if config.topk_method == "noaux_tc" or config.scoring_func == "sigmoid":
        yield Stored(f"{there}mlp.gate.{BIAS}", f"{here}mlp.gate.expert_bias")
    for e in range(config.n_routed_experts):
        for half, name in enumerate(MLP):
            ours = "down_proj" if name == "down_proj" else "gate_up_proj"
            joined = None if name == "down_proj" else half
            yield Stored(f"{there}mlp.experts.{e}.{name}.weight", f"{here}mlp.experts.{ours}", expert=e, half=joined)
    if config.n_shared_experts:
        for name in MLP:
            yield Stored(f"{there}mlp.shared_experts.{name}.weight", f"{here}mlp.shared_experts.{name}.weight")


def attention(config: ModelConfig) -> dict[str, int]:
    """The matrices and norms of attention, with the number of heads that have rotary channels."""
    heads = config.num_attention_heads
    if config.attention == "gqa":
        return {"q_proj": heads, "k_proj": config.num_key_value_heads or heads, "v_proj": 0, "o_proj": 0}
    queries = {"q_a_proj": 0, "q_a_layernorm": 0, "q_b_proj": heads} if config.q_lora_rank else {"q_proj": heads}
    return queries | {"kv_a_proj_with_mqa": 1, "kv_a_layernorm": 0, "kv_b_proj": 0, "o_proj": 0}


def stored_shape(stored: Stored, shape: torch.Size) -> tuple[int, ...]:
    """The shape on disk of a tensor that is part of our parameter of shape `shape`."""
    if stored.expert is None:
        return tuple(shape)
    _, rows, columns = shape
    return (columns // (1 if stored.half is None else 2), rows)


def to_disk(stored: Stored, ours: Tensor, rotary: int, permute: str | None) -> Tensor:
    """The tensor on disk. ours: the parameter, or the expert's matrix of a stacked one. rotary: channels that rotate.
    permute: see `permute_rotary`; None if the orders agree."""
    if stored.expert is not None:
        return (ours if stored.half is None else ours.chunk(2, -1)[stored.half]).T
    return permute_rotary(ours, stored.heads, rotary, permute) if stored.heads and permute else ours


def from_disk(stored: list[Stored], tensors: list[Tensor], rotary: int, permute: str | None) -> Tensor:
    """Our matrix from all tensors on disk that belong to it: the inverse of `to_disk`."""
    if stored[0].expert is not None:
        return torch.cat([tensor.T for tensor in tensors], -1)
    (tensor,) = tensors
    return permute_rotary(tensor, stored[0].heads, rotary, permute) if stored[0].heads and permute else tensor


def permute_rotary(weight: Tensor, heads: int, rotary: int, to: str) -> Tensor:
    """Reorders the last `rotary` rows of each head: to `pairs` from halves, (0, R/2, 1, R/2 + 1, …), or to `halves`."""
    rows = weight.unflatten(0, (heads, -1))
    fixed, turning = rows.split((rows.shape[1] - rotary, rotary), 1)
    split = (2, rotary // 2) if to == "pairs" else (rotary // 2, 2)
    turning = turning.unflatten(1, split).transpose(1, 2).flatten(1, 2)
    return torch.cat((fixed, turning), 1).flatten(0, 1)


def permutation(model_interleaves: bool, wanted_interleaved: bool) -> str | None:
    """The argument `to` of `permute_rotary` for a conversion; None if the orders agree."""
    if model_interleaves == wanted_interleaved:
        return None
    return "pairs" if wanted_interleaved else "halves"
