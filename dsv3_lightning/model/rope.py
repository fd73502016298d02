"""Rotary positions and their YaRN extension (RoPE arXiv 2104.09864; YaRN arXiv 2309.00071; V3 §4.3)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3_lightning.model.config import ModelConfig, Yarn


class CosSin(NamedTuple):
    """Angles of T positions: cos and sin [T, R/2] fp32, already times YaRN's factor on the rotary part."""

    cos: Tensor
    sin: Tensor


def cos_sin(config: ModelConfig, positions_T: Tensor) -> CosSin:
    """cos and sin at positions (int64 [T]), recomputed per forward pass so that there is no buffer to cast."""
    frequencies = inverse_frequencies(
        config.qk_rope_head_dim, config.rope_theta, config.rope_scaling, positions_T.device
    )
    angles = positions_T.float()[:, None] * frequencies
    factor = attention_factor(config.rope_scaling)
    return CosSin(angles.cos() * factor, angles.sin() * factor)


def apply_rope(x: Tensor, rope: CosSin, interleave: bool) -> Tensor:
    """Rotates channel pairs of x [..., T, R]: neighbors (2i, 2i+1) with `interleave`, else (i, i + R/2).

    The result holds all first channels of the pairs, then all second ones, in both cases: queries and keys are
    permuted alike, so their products are those of either layout.
    """
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1) if interleave else x.float().chunk(2, -1)
    return torch.cat((first * rope.cos - second * rope.sin, second * rope.cos + first * rope.sin), -1).to(x.dtype)


def inverse_frequencies(dim: int, theta: float, yarn: Yarn | None, device: torch.device | None = None) -> Tensor:
    """Radians per position of each pair, fp32 [dim/2]; YaRN divides the slow ones by its factor, with a ramp."""
    frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    if yarn is None:
        return frequencies

    def correction_dim(rotations: float) -> float:  # the (fractional) pair that rotates so often in the original length
        return dim * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(correction_dim(yarn.beta_fast)), 0)
    high = min(math.ceil(correction_dim(yarn.beta_slow)), dim - 1)
    # A width of 0.001 in place of 0; below 0, where no pair rotates so often, nothing is divided: as in transformers.
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device=device) - low) / (high - low or 0.001)
    slow = ramp.clamp(0, 1)
    return frequencies * (1 - slow) + frequencies / yarn.factor * slow


def yarn_mscale(factor: float, weight: float) -> float:
    """0.1 · weight · ln(factor) + 1 (arXiv 2309.00071 eq. 22, with the released code's weight)."""
    return 0.1 * weight * math.log(factor) + 1.0


def attention_factor(yarn: Yarn | None) -> float:
    """Factor on the rotary part of queries and keys: 1 for the released models, whose two weights are equal."""
    if yarn is None:
        return 1.0
    if yarn.mscale and yarn.mscale_all_dim:
        return yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    return yarn_mscale(yarn.factor, 1.0)


def softmax_scale(config: ModelConfig) -> float:
    """1/sqrt(d_qk), times YaRN's squared mscale for all channels (V3 §4.3)."""
    scale = config.qk_head_dim**-0.5
    if config.rope_scaling is not None and config.rope_scaling.mscale_all_dim:
        scale *= yarn_mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2
    return scale
