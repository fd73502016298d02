"""What decoding remembers of a token: MLA's latent and rotary key, or grouped-query attention's keys and values.

Keys and values of MLA are never expanded (V3 §2.1.1): W_UK is absorbed into the query, which then meets the latents
themselves, and W_UV is applied to their weighted sum. So a token costs kv_lora_rank + qk_rope_head_dim numbers a layer.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_lightning.model.attention import GroupedQueryAttention, MultiHeadLatentAttention, causal_attention
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.rope import Rotation, rotate


class Cache:
    """Entries of B rows, each up to `capacity` tokens, for `layers` attention layers: [layers, B, capacity, C]."""

    def __init__(self, config: ModelConfig, layers: int, rows: int, capacity: int, like: Tensor) -> None:
        if config.attention == "mla":
            size = config.kv_lora_rank + config.qk_rope_head_dim
        else:
            assert config.num_key_value_heads is not None, "ModelConfig sees to it"
            size = config.num_key_value_heads * (config.qk_head_dim + config.v_head_dim)
        self.entries = like.new_zeros(layers, rows, capacity, size)

    def move(self, source: int, target: int) -> None:
        """Row `source` takes the place of row `target`."""
        self.entries[:, target] = self.entries[:, source]


class Step:
    """T new tokens for each of R neighbouring rows of a cache, from `first` on; lengths: of each row before them.

    table: the rotation at every position that the cache has room for.
    """

    def __init__(self, table: Rotation, first: int, lengths: list[int], T: int) -> None:
        self.rows, self.T = slice(first, first + len(lengths)), T
        self.start, self.end = max(lengths), max(lengths) + T
        self.even = min(lengths) == self.start
        self.hidden_RTS: Tensor | None = None
        device = table.cos.device
        if self.even:
            cos, sin = (x[None, self.start : self.end] for x in table)
            if T > 1:
                self.hidden_RTS = torch.ones(1, T, self.end, dtype=torch.bool, device=device).triu(self.start + 1)
        else:
            self.positions_RT = torch.tensor(lengths, device=device)[:, None] + torch.arange(T, device=device)
            cos, sin = (x[self.positions_RT] for x in table)
            self.hidden_RTS = torch.arange(self.end, device=device) > self.positions_RT[..., None]
        self.keys_at = Rotation(cos, sin)  # [R or 1, T, rope / 2]
        self.queries_at = Rotation(cos[:, None], sin[:, None])

    def append(self, entries_BSC: Tensor, new_RTC: Tensor) -> Tensor:
        """Writes what the new tokens leave, and returns what they may look at: [R, end, C]."""
        here = entries_BSC[self.rows]
        if self.even:
            here[:, self.start : self.end] = new_RTC
        else:
            here.scatter_(1, self.positions_RT[..., None].expand_as(new_RTC), new_RTC)
        return here[:, : self.end]

    def of_last(self) -> "Step":
        """The same for queries of the last of the new tokens alone."""
        last = copy.copy(self)
        last.T, last.start = 1, self.end - 1
        last.queries_at = Rotation(*(x[:, :, -1:] for x in self.queries_at))
        last.hidden_RTS = None if self.even or self.hidden_RTS is None else self.hidden_RTS[:, -1:]
        return last


def attend(attention: nn.Module, x_RTD: Tensor, entries_BSC: Tensor, step: Step, only_last: bool = False) -> Tensor:
    """What `attention` makes of the new tokens, which see all before them: [R, T, D]; of the last one: [R, 1, D]."""
    if isinstance(attention, MultiHeadLatentAttention):
        return attend_latents(attention, x_RTD, entries_BSC, step, only_last)
    assert isinstance(attention, GroupedQueryAttention)
    return attend_shared(attention, x_RTD, entries_BSC, step, only_last)


def attend_latents(
    attention: MultiHeadLatentAttention, x_RTD: Tensor, entries_BSC: Tensor, step: Step, only_last: bool
) -> Tensor:
    c_kv, k_r = attention.kv_a_proj_with_mqa(x_RTD).split((attention.kv_rank, attention.rope), -1)
    k_r = rotate(k_r, step.keys_at, attention.interleave)
    latents_RSC = step.append(entries_BSC, torch.cat((attention.kv_a_layernorm(c_kv), k_r), -1))
    if only_last:
        x_RTD, step = x_RTD[:, -1:], step.of_last()
    q_RHTC = attention.queries(x_RTD, step.queries_at)
    up = attention.kv_b_proj.weight.unflatten(0, (attention.heads, -1))
    w_uk, w_uv = up.split((attention.nope, attention.v_dim), 1)
    if step.start == 0 and step.T > 1:  # a prompt: expanded as in training, which takes fewer products
        c_kv, k_r = latents_RSC.split((attention.kv_rank, attention.rope), -1)
        k_c = c_kv[:, None] @ w_uk.mT
        k_RHTC = torch.cat((k_c, k_r[:, None].expand(-1, attention.heads, -1, -1)), -1)
        out_RHTC = causal_attention(q_RHTC, k_RHTC, c_kv[:, None] @ w_uv.mT, attention.scale)
    else:
        q_c, q_r = q_RHTC.split((attention.nope, attention.rope), -1)
        q_RHTC = torch.cat((q_c @ w_uk, q_r), -1)
        weights_RHTS = softmax(q_RHTC.flatten(1, 2) @ latents_RSC.mT, attention.scale, attention.heads, step)
        mixed_RHTC = (weights_RHTS @ latents_RSC[..., : attention.kv_rank]).unflatten(1, (attention.heads, -1))
        out_RHTC = mixed_RHTC @ w_uv.mT
    return attention.o_proj(out_RHTC.transpose(1, 2).flatten(2))


def attend_shared(
    attention: GroupedQueryAttention, x_RTD: Tensor, entries_BSC: Tensor, step: Step, only_last: bool
) -> Tensor:
    shared = attention.kv_heads
    k, v = (proj(x_RTD).unflatten(-1, (shared, -1)) for proj in (attention.k_proj, attention.v_proj))
    k = attention.rotated(k.transpose(1, 2), step.queries_at).transpose(1, 2)
    entries = step.append(entries_BSC, torch.cat((k.flatten(2), v.flatten(2)), -1))
    if only_last:
        x_RTD, step = x_RTD[:, -1:], step.of_last()
    keys, values = entries.split((k.shape[2] * k.shape[3], v.shape[2] * v.shape[3]), -1)
    k_RGSC, v_RGSC = (x.unflatten(-1, (shared, -1)).transpose(1, 2) for x in (keys, values))
    q_RGNC = attention.queries(x_RTD, step.queries_at).unflatten(1, (shared, -1)).flatten(2, 3)
    scores_RNS = (q_RGNC @ k_RGSC.mT).flatten(1, 2)
    weights = softmax(scores_RNS, attention.scale, attention.heads, step).unflatten(1, (shared, -1))
    out_RHTC = (weights @ v_RGSC).flatten(1, 2).unflatten(1, (attention.heads, -1))
    return attention.o_proj(out_RHTC.transpose(1, 2).flatten(2))


def softmax(scores_RNS: Tensor, scale: float, heads: int, step: Step) -> Tensor:
    """Over what each new token may see; N runs over heads and, within them, new tokens."""
    scores = scores_RNS.float() * scale
    if step.hidden_RTS is not None:
        hidden = step.hidden_RTS[:, None]
        scores = scores.unflatten(1, (heads, -1)).masked_fill(hidden, -torch.inf).flatten(1, 2)
    return F.softmax(scores, -1).to(scores_RNS.dtype)
