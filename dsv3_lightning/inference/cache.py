"""The cache for decoding: MLA's latents and rotary keys, or grouped-query attention's keys and values.

MLA's keys and values are not expanded (V3 §2.1.1; see layers.LatentAttention), so a token takes
kv_lora_rank + qk_rope_head_dim numbers per layer.
"""

import copy

import torch
from torch import Tensor

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.rope import CosSin


class Cache:
    """Entries of B rows, each up to `capacity` tokens, for `layers` attention layers: [layers, B, capacity, C].

    lower: the settings to name in the ConfigError for insufficient memory.
    """

    def __init__(self, config: ModelConfig, layers: int, rows: int, capacity: int, like: Tensor, lower: str) -> None:
        if config.attention == "mla":
            size = config.kv_lora_rank + config.qk_rope_head_dim
        else:
            assert config.num_key_value_heads is not None, "ModelConfig sees to it"
            size = config.num_key_value_heads * (config.qk_head_dim + config.v_head_dim)
        try:
            self.entries = like.new_zeros(layers, rows, capacity, size)
        except RuntimeError as error:  # torch's error for insufficient memory
            needed = layers * rows * capacity * size * like.element_size()
            raise ConfigError(
                f"a cache for {rows} x {capacity} tokens takes {needed:,} bytes, more than {like.device} has; "
                f"lower {lower}"
            ) from error

    def move(self, source: int, target: int) -> None:
        """Overwrites row `target` by row `source`."""
        self.entries[:, target] = self.entries[:, source]


class Step:
    """A forward pass of T new tokens for each of B neighboring rows of a cache, from `first` on.

    lengths: the rows' lengths before it. table: the rotation at all positions of the cache.
    """

    def __init__(self, table: CosSin, first: int, lengths: list[int], T: int) -> None:
        self.rows, self.T = slice(first, first + len(lengths)), T
        self.start, self.end = max(lengths), max(lengths) + T
        self.even = min(lengths) == self.start
        self.hidden_BTU: Tensor | None = None
        device = table.cos.device
        if self.even:
            cos, sin = (x[None, self.start : self.end] for x in table)
            if T > 1:
                self.hidden_BTU = torch.ones(1, T, self.end, dtype=torch.bool, device=device).triu(self.start + 1)
        else:
            self.positions_BT = torch.tensor(lengths, device=device)[:, None] + torch.arange(T, device=device)
            cos, sin = (x[self.positions_BT] for x in table)
            self.hidden_BTU = torch.arange(self.end, device=device) > self.positions_BT[..., None]
        self.rotation = CosSin(cos[:, :, None], sin[:, :, None])  # [B or 1, T, 1, rope / 2]
        self.rotation_of_heads = CosSin(cos[:, None], sin[:, None])

    def append(self, entries_BUC: Tensor, new_BTC: Tensor) -> Tensor:
        """Writes the new tokens' entries to the cache; returns all entries that they can attend to: [B, end, C]."""
        here = entries_BUC[self.rows]
        if self.even:
            here[:, self.start : self.end] = new_BTC
        else:
            here.scatter_(1, self.positions_BT[..., None].expand_as(new_BTC), new_BTC)
        return here[:, : self.end]

    def of_last(self) -> "Step":
        """The same step for only the last new token's query."""
        last = copy.copy(self)
        last.T, last.start = 1, self.end - 1
        last.rotation_of_heads = CosSin(*(x[:, :, -1:] for x in self.rotation_of_heads))
        last.hidden_BTU = None if self.even or self.hidden_BTU is None else self.hidden_BTU[:, -1:]
        return last
