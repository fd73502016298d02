"""Bytes that the memory-bound parts of a step read and write, counted in the code of `model/`.

Eager: one kernel per operation, as the code runs without a compiler. Fused: each part reads its inputs and writes its
results once. c and r are the bytes of a number in matrix products and in the residual stream.
"""

from collections.abc import Sequence
from typing import NamedTuple

from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.planning.parameters import attention_shapes


class Passes(NamedTuple):
    """Bytes of the forward and of the backward pass."""

    forward: float
    backward: float

    def __add__(self, other: tuple) -> "Passes":
        return Passes(self.forward + other[0], self.backward + other[1])

    def times(self, n: float) -> "Passes":
        return Passes(n * self.forward, n * self.backward)


def cast(from_bytes: int, to_bytes: int) -> int:
    """Bytes per number of a cast, none if it changes nothing."""
    return 0 if from_bytes == to_bytes else from_bytes + to_bytes


def norm(c: int, r: int, fused: bool) -> Passes:
    """RMSNorm, per number (model/norm.py): to fp32, normalized, to the dtype of products; x's gradient from both."""
    if fused:
        return Passes(r + c, c + 2 * r)
    return Passes(cast(r, 4) + 8 + cast(4, c), cast(c, 4) + 12 + cast(4, r))


def residual(c: int, r: int) -> Passes:
    """x + branch, per number: read both, write one; back: a copy for the branch, and the sum of two gradients."""
    return Passes(2 * r + c, cast(r, c) + 3 * r)


def attention_copies(model: ModelConfig, c: int, fused: bool, padded: bool) -> Passes:
    """What is between the projections and the attention kernel, per token (model/attention.py, model/rope.py).

    Eager: rotation in fp32 with six operations on halves, queries and keys put together, the result back to one row per
    token, and values filled up to the keys' width where the kernel wants equal widths.
    """
    H, rope = model.num_attention_heads, model.qk_rope_head_dim if model.attention == "mla" else model.qk_head_dim
    C, V = model.qk_head_dim, model.v_head_dim
    if fused:
        copies = 2 * c * (2 * C) * H
        return Passes(copies, copies)
    rotation = rope * (cast(c, 4) + 6 * 12 // 2 + 8 + cast(4, c))
    shared = 1 if model.attention == "mla" else H  # one rotary key for all heads
    copies = H * (2 * c * (2 * C + V)) + (H + shared) * rotation + (H * c * (C + V) if padded else 0)
    return Passes(copies, copies + H * c * C)  # and the rotary key's gradient is a sum over heads


def swiglu(width: int, c: int, fused: bool, joined: bool) -> Passes:
    """silu(gate) · up, per token. joined: gate and up are halves of one product, whose gradient is put together."""
    if fused:
        return Passes(3 * c * width, 5 * c * width)
    return Passes(5 * c * width, (13 if joined else 9) * c * width)


def router(model: ModelConfig, c: int, fused: bool) -> Passes:
    """Scores, choice, gates, counts and balance terms, in fp32, per token (model/router.py, model/balance.py).

    Eager: about ten operations of 8 bytes on [N, E], six more with groups; the input is cast to fp32.
    """
    E = model.n_routed_experts
    if fused:
        return Passes(16 * E, 16 * E)
    operations = 10 + (6 if model.n_group > 1 else 0)
    return Passes(8 * operations * E + cast(c, 4) * model.hidden_size, 60 * E + cast(4, c) * model.hidden_size)


class Quantization(NamedTuple):
    """Bytes per token of writing numbers as tiles in FP8, of an attention, a dense FFN, and a MoE layer."""

    attention: Passes
    dense: Passes
    moe: Passes


def quantization(model: ModelConfig, fused: bool, imbalance: float) -> Quantization:
    """FP8 tiles (V3 §3.3.2) of the inputs and output gradients of all products but the heads' and the routers'.

    Each input is read and written as tiles forward, and backward regrouped for the weight's gradient; each output
    gradient is written in both groupings. Fused: the kernel that makes a number writes its tiles. Weights, once per
    step, aren't counted. Routed tokens are quantized before they travel.
    """
    D, H, K, F = model.hidden_size, model.num_attention_heads, model.num_experts_per_tok, model.moe_intermediate_size
    make = 1 if fused else 3

    def tiles(new: float, inputs: float, outputs: float) -> Passes:
        return Passes(make * new, 2 * inputs + 2 * make * outputs)

    values, shared = H * model.v_head_dim, model.n_shared_experts * F
    queries, keys = H * model.qk_head_dim, H * (model.qk_nope_head_dim + model.v_head_dim)
    if model.attention == "gqa":
        inputs, heads = D + values, model.num_key_value_heads or H
        outputs = D + queries + heads * (model.qk_head_dim + model.v_head_dim)
    else:
        latent = model.q_lora_rank or 0
        inputs = D + latent + model.kv_lora_rank + values
        outputs = D + latent + queries + model.kv_lora_rank + model.qk_rope_head_dim + keys
    narrow, wide = imbalance * K * F, imbalance * K * D
    return Quantization(
        tiles(inputs, inputs, outputs),
        tiles(D + model.intermediate_size, D + model.intermediate_size, D + 2 * model.intermediate_size),
        tiles(D + narrow + shared, wide + narrow + D + shared, wide + 2 * narrow + D + 2 * shared),
    )


# Bytes per number of rounding in plain torch, one operation after the other (model/fp8.py, `round_to`): bf16 to fp32,
# magnitude, padding, maximum; to fp32 again, scales spread, division, cast. Columns spread their scales in two copies;
# an input that is regrouped is made wide first.
ROUND = 6 + 8 + 8 + 4 + 6 + 4 + 12 + 5
ROUND_COLUMNS = ROUND + 8
REGROUP = (5 + 4 + 12) + (ROUND_COLUMNS - 6 - 6)


def rounding(model: ModelConfig) -> Quantization:
    """What `compute.fp8: true` does for its products' tiles, in plain torch, but for weights: each product rounds its
    input, regroups it for the weight's gradient, and rounds the gradient of its output twice. Routed experts don't."""

    def layers(shapes: Sequence[tuple[int, int]]) -> Passes:
        outputs, inputs = (sum(sizes) for sizes in zip(*shapes, strict=True))
        return Passes(ROUND * inputs, REGROUP * inputs + (ROUND + ROUND_COLUMNS) * outputs)

    def feed_forward(width: int) -> Passes:
        D = model.hidden_size
        return layers([(width, D), (width, D), (D, width)])

    shared = model.n_shared_experts * model.moe_intermediate_size
    dense, nothing = feed_forward(model.intermediate_size), Passes(0, 0)
    return Quantization(layers(attention_shapes(model)), dense, feed_forward(shared) if shared else nothing)


# Reads and writes of rows of D numbers for each routed token, forward and backward (model/permute.py,
# parallel/dispatch.py). `local`: to the order of experts, and back with the gates. `sorted`: that, and again at the
# receiver, in both directions. `gated`: as sorted, with sums over a token's rows in fp32, a row at a time, which are
# seven passes. `by_node`: that, with such a sum for each node. `fused`: copies by the exchange's own kernels.
ROW_PASSES = {
    "local": Passes(5, 7),
    "sorted": Passes(9, 11),
    "gated": Passes(13, 13),
    "by_node": Passes(17, 17),
    "fused": Passes(3, 3),
}


def logits(c: int, fused: bool) -> Passes:
    """Softmax, loss and gradient, per logit (model/fused_loss.py): log-softmax to fp32, exp, scatter, mask, cast."""
    return Passes((c + 4) + 8 + 8 + (4 + c), 0) if not fused else Passes(3 * c, 0)


ADAMW = 28 + 12  # bytes per fp32 parameter: read p, g, m, v, write p, m, v; the norm reads g, clipping rewrites it


def adamw(gradient: int, moment: int) -> int:
    """Bytes per parameter of a step with fp32 masters, bf16 copies, and gradients and moments of these bytes."""
    return 8 + 2 + gradient * 4 + moment * 4


def muon(gradient: int, moment: int, computed: int) -> int:
    """Bytes per parameter of a step of Muon, but for the Newton-Schulz steps: beside what AdamW moves, without the
    second moment, the gradient and the momentum are read again, and what is orthogonalized is written and read."""
    return 8 + 2 + gradient * 5 + moment * 3 + computed * 2
