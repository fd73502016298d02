"""Sampling of tokens: temperature, then top-k, top-p and min-p, all on the tempered distribution."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsv3_lightning.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling. Raises ConfigError.

    temperature: 0 is greedy. top_k: only the k most likely tokens; 0: all. top_p: the fewest most likely tokens whose
    probabilities sum to at least p. min_p: tokens at least p times as likely as the most likely one. One always stays.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature}: must be at least 0 (0 is greedy)")
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k}: must be at least 0 (0 is off)")
        for name in ("top_p", "min_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be between 0 and 1")

    def probabilities(self, logits_NV: Tensor) -> Tensor:
        """The distribution to sample from, fp64 [N, V]; with temperature 0 all weight is on the most likely token."""
        logits_NV = logits_NV.double()
        if self.temperature == 0:
            return torch.zeros_like(logits_NV).scatter_(1, logits_NV.argmax(1, keepdim=True), 1.0)
        # Shifted first, so a tiny temperature can't overflow.
        p_NV = ((logits_NV - logits_NV.amax(1, keepdim=True)) / self.temperature).softmax(1)
        if not (self.top_k or self.top_p < 1 or self.min_p):
            return p_NV
        sorted_NV, order_NV = p_NV.sort(dim=1, descending=True, stable=True)
        kept_NV = sorted_NV >= self.min_p * sorted_NV[:, :1]
        kept_NV &= sorted_NV.cumsum(1) - sorted_NV < self.top_p  # the more likely tokens sum to less than p
        if self.top_k:
            kept_NV[:, self.top_k :] = False
        kept_NV[:, 0] = True
        kept = torch.zeros_like(kept_NV).scatter_(1, order_NV, kept_NV)
        p_NV = p_NV * kept
        return p_NV / p_NV.sum(1, keepdim=True)

    def pick(self, logits_NV: Tensor, generators: list[torch.Generator]) -> list[int]:
        """Samples one token per row, each from its own random stream."""
        if self.temperature == 0:
            return logits_NV.argmax(1).tolist()
        p_NV = self.probabilities(logits_NV).cpu()
        return [draw(p_V, generator) for p_V, generator in zip(p_NV, generators, strict=True)]


def draw(p_V: Tensor, generator: torch.Generator) -> int:
    return int(torch.multinomial(p_V, 1, generator=generator))


def random_stream(seed: int, number: int = 0) -> torch.Generator:
    """The random stream of text `number` (from 0), independent between numbers and between seeds."""
    (mixed,) = np.random.SeedSequence(seed, spawn_key=(number,)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed))
