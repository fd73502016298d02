"""One token of one text on a CPU, where calling an operation takes as long as its work: vectors, and few operations.

Norms, the gates of experts and the residual sums are factors and sums of products with vectors (`addmv`), the choice of
experts is Python's, and projections of one input are one matrix. W_UK and W_UV are multiplied into the projections
beside them where that makes no more numbers. Rotated channel pairs (f, s) become f·cos - s·sin and s·cos + f·sin: a
second set of rows of the projection gives (-s, f), so that a rotation is two operations. The cache is that of
layers.py. tests/inference/test_decoding.py compares the results with those of the model's layers.
"""

from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from dsv3_lightning.model.attention import MultiHeadLatentAttention
from dsv3_lightning.model.block import Block
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.moe import MLP, MoE
from dsv3_lightning.model.mtp import MTPModule
from dsv3_lightning.model.norm import RMSNorm
from dsv3_lightning.model.transformer import Transformer


def fits(model: Transformer) -> bool:
    """Whether the layers of this file compute what the model does: MLA in fp32 on a CPU."""
    weight = model.embed_tokens.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and model.config.attention == "mla"


def by_columns(weight: Tensor) -> Tensor:
    """A copy in column-major order, which products with vectors read faster."""
    return weight.t().contiguous().t()


class Scale:
    """RMSNorm of a vector, written to `out`, or its factor alone."""

    def __init__(self, norm: RMSNorm) -> None:
        self.gain, self.eps, self.size = norm.weight, norm.eps, len(norm.weight)
        self.zero = torch.zeros_like(norm.weight)

    def factor(self, x_D: Tensor) -> float:
        return 1.0 / sqrt(float(torch.dot(x_D, x_D)) / self.size + self.eps)

    def __call__(self, x_D: Tensor, out: Tensor) -> Tensor:
        return torch.addcmul(self.zero, x_D, self.gain, value=self.factor(x_D), out=out)


class Attention:
    """MLA of one new token. Adds its output to x."""

    def __init__(self, attention: MultiHeadLatentAttention) -> None:
        H, rank, nope, rope = attention.heads, attention.kv_rank, attention.nope_size, attention.rope_size
        self.rank, self.heads, self.rope = rank, H, rope
        up = attention.kv_b_proj.weight.unflatten(0, (H, -1))
        self.w_uk, w_uv = up.split((nope, attention.v_size), 1)
        first, second = range(0, rope, 2), range(1, rope, 2)
        if not attention.interleave:
            first, second = range(rope // 2), range(rope // 2, rope)
        order, swapped = torch.tensor([*first, *second]), torch.tensor([*second, *first])
        sign = torch.ones(rope).index_fill(0, torch.arange(rope // 2), -1.0)[:, None]

        def turned(rows: Tensor) -> Tensor:
            """Rows [..., 2 rope, inputs] for the rotated channels in the cache's order, then for their partners."""
            return torch.cat((rows[..., order, :], rows[..., swapped, :] * sign), -2)

        self.compressed = attention.compresses_queries
        w_q = (attention.q_b_proj if self.compressed else attention.q_proj).weight.unflatten(0, (H, -1))
        q_c, q_r = w_q.split((nope, rope), 1)
        self.absorbs_k = rank * q_c.shape[2] <= nope * (rank + q_c.shape[2])
        if self.absorbs_k:
            q_c = (self.w_uk.mT.double() @ q_c.double()).float()
        w_q = torch.cat((q_c, turned(q_r)), 1).flatten(0, 1) * attention.scale
        w_dkv, w_kr = attention.kv_a_proj_with_mqa.weight.split((rank, rope))
        w_kv = torch.cat((w_dkv, turned(w_kr)))
        self.kv_norm = Scale(attention.kv_a_layernorm)
        if self.compressed:
            self.q_norm = Scale(attention.q_a_layernorm)
            self.w_q = by_columns(w_q * self.q_norm.gain)
            self.w_down = by_columns(torch.cat((attention.q_a_proj.weight, w_kv)))
            self.query = self.w_q.new_empty(len(w_q))
        else:
            self.w_down = by_columns(torch.cat((w_q, w_kv)))
        self.down = self.w_down.new_empty(len(self.w_down))
        before, self.c_kv, self.k_r, self.k_partner = self.down.split((len(self.down) - len(w_kv), rank, rope, rope))
        self.c_q, query = (before, self.query) if self.compressed else (before, before)
        parts = query.view(H, -1)
        self.q_c, self.q_r, self.q_partner = parts.split((rank if self.absorbs_k else nope, rope, rope), 1)
        self.q_whole = parts[:, : rank + rope] if self.absorbs_k else query.new_empty(H, rank + rope)
        w_o = attention.o_proj.weight.unflatten(1, (H, -1)).transpose(0, 1)  # [H, D, v]
        D, v = w_o.shape[1:]
        self.absorbs_v = rank * D <= v * (rank + D)
        if self.absorbs_v:
            self.w_o = by_columns((w_o.double() @ w_uv.double()).float().transpose(0, 1).flatten(1))
        else:
            self.w_uv, self.w_o = w_uv.mT, attention.o_proj.weight

    def __call__(self, x_D: Tensor, h_D: Tensor, entries_UC: Tensor, place: int, cos: Tensor, sin: Tensor) -> None:
        torch.mv(self.w_down, h_D, out=self.down)
        if self.compressed:
            torch.addmv(self.query, self.w_q, self.c_q, beta=0, alpha=self.q_norm.factor(self.c_q), out=self.query)
        entry_C = entries_UC[place]
        c_kv, k_r = entry_C.split((self.rank, self.rope))
        self.kv_norm(self.c_kv, c_kv)
        torch.mul(self.k_r, cos, out=k_r).addcmul_(self.k_partner, sin)
        self.q_r.mul_(cos).addcmul_(self.q_partner, sin)
        if not self.absorbs_k:
            torch.bmm(self.q_c[:, None], self.w_uk, out=self.q_whole[:, None, : self.rank])
            self.q_whole[:, self.rank :] = self.q_r
        seen_UC = entries_UC[: place + 1]
        weights_HU = torch.softmax(torch.mm(self.q_whole, seen_UC.t()), -1)
        mixed_HC = torch.mm(weights_HU, seen_UC[:, : self.rank])
        if not self.absorbs_v:
            mixed_HC = torch.bmm(mixed_HC[:, None], self.w_uv)
        x_D.addmv_(self.w_o, mixed_HC.view(-1))


class FeedForward:
    """SwiGLU. Adds its output to x."""

    def __init__(self, mlp: MLP) -> None:
        self.w_gate, self.w_up, self.w_down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight

    def __call__(self, x_D: Tensor, h_D: Tensor) -> None:
        inner = torch.nn.functional.silu(torch.mv(self.w_gate, h_D)).mul_(torch.mv(self.w_up, h_D))
        x_D.addmv_(self.w_down, inner)


class Experts:
    """DeepSeekMoE. Adds its output to x."""

    def __init__(self, moe: MoE) -> None:
        self.config, self.router, self.bias = moe.config, moe.gate.weight, moe.gate.expert_bias
        self.additive = self.config.expert_bias_kind == "additive"
        self.gate_up = [w_DF.t() for w_DF in moe.experts.gate_up_proj.unbind()]
        self.down = [w_FD.t() for w_FD in moe.experts.down_proj.unbind()]
        self.shared = None if moe.shared_experts is None else FeedForward(moe.shared_experts)
        K, width = self.config.num_experts_per_tok, self.config.moe_intermediate_size
        inner_KF = moe.experts.gate_up_proj.new_empty(K, 2 * width)
        self.rows = inner_KF.unbind()
        self.gate_KF, self.up_KF = inner_KF.chunk(2, 1)

    def __call__(self, x_D: Tensor, h_D: Tensor) -> None:
        logits_E = torch.mv(self.router, h_D)
        scores_E = logits_E.sigmoid_() if self.config.scoring_func == "sigmoid" else logits_E.softmax(-1)
        biased_E = scores_E + self.bias if self.additive else scores_E * (1 + self.bias)
        experts, gates = choose(scores_E.tolist(), biased_E.tolist(), self.config)
        self.products(x_D, h_D, experts, gates)
        if self.shared is not None:
            self.shared(x_D, h_D)

    def products(self, x_D: Tensor, h_D: Tensor, experts: list[int], gates: list[float]) -> None:
        for expert, row_F in zip(experts, self.rows):
            torch.mv(self.gate_up[expert], h_D, out=row_F)
        inner_KF = torch.nn.functional.silu(self.gate_KF).mul_(self.up_KF)
        for expert, gate, inner_F in zip(experts, gates, inner_KF.unbind()):
            x_D.addmv_(self.down[expert], inner_F, alpha=gate)


def choose(scores: list[float], biased: list[float], config: ModelConfig) -> tuple[list[int], list[float]]:
    """A token's experts and their gates, as `route` has them."""
    allowed: Any = range(len(scores))
    if config.n_group > 1:
        size, best = len(scores) // config.n_group, 2 if config.topk_method == "noaux_tc" else 1
        starts = range(0, len(scores), size)
        strength = {start: sum(sorted(biased[start : start + size])[-best:]) for start in starts}
        chosen = sorted(starts, key=strength.__getitem__, reverse=True)[: config.topk_group]
        allowed = [expert for start in chosen for expert in range(start, start + size)]
    experts = sorted(allowed, key=biased.__getitem__, reverse=True)[: config.num_experts_per_tok]
    gates = [scores[expert] for expert in experts]
    factor = config.routed_scaling_factor / (sum(gates) + 1e-20 if config.norm_topk_prob else 1.0)
    return experts, [gate * factor for gate in gates]


class SingleLayer:
    """A block. Adds to x."""

    def __init__(self, block: nn.Module) -> None:
        assert isinstance(block, Block)
        self.norm, self.mlp_norm = Scale(block.input_layernorm), Scale(block.post_attention_layernorm)
        self.attention: Any = Attention(block.self_attn)  # type: ignore[arg-type]
        self.mlp = Experts(block.mlp) if isinstance(block.mlp, MoE) else FeedForward(block.mlp)
        self.h_D = torch.empty_like(self.norm.gain)

    def __call__(self, x_D: Tensor, entries_UC: Tensor, place: int, cos: Tensor, sin: Tensor) -> None:
        self.attention(x_D, self.norm(x_D, self.h_D), entries_UC, place, cos, sin)
        self.mlp(x_D, self.mlp_norm(x_D, self.h_D))


class SingleDraft:
    """An MTP module."""

    def __init__(self, module: nn.Module) -> None:
        assert isinstance(module, MTPModule)
        self.enorm, self.hnorm = Scale(module.enorm), Scale(module.hnorm)
        self.w_eh, self.layer = module.eh_proj.weight, SingleLayer(module.block)
        self.joined = self.w_eh.new_empty(self.w_eh.shape[1])
        self.halves = self.joined.chunk(2)

    def __call__(
        self, embedding_D: Tensor, h_D: Tensor, entries_UC: Tensor, place: int, cos: Tensor, sin: Tensor
    ) -> Tensor:
        self.enorm(embedding_D, self.halves[0])
        self.hnorm(h_D, self.halves[1])
        x_D = torch.mv(self.w_eh, self.joined)
        self.layer(x_D, entries_UC, place, cos, sin)
        return x_D
