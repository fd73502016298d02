"""Layers for decoding: the model's parameters, with few operations per token.

For a single token, launch overhead takes most of the time. So nothing here is a module: norms, products and routing are
direct calls on tensors that are looked up when the decoder is made. tests/inference/test_decoding.py compares the
results with those of the model's layers.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_lightning.inference.cache import Step
from dsv3_lightning.model.attention import MultiHeadLatentAttention
from dsv3_lightning.model.attention_kernels import causal_attention
from dsv3_lightning.model.block import Block
from dsv3_lightning.model.grouped_query import GroupedQueryAttention
from dsv3_lightning.model.moe import MLP, MoE
from dsv3_lightning.model.mtp import MTPModule
from dsv3_lightning.model.norm import RMSNorm
from dsv3_lightning.model.rope import apply_rope
from dsv3_lightning.model.router import route
from dsv3_lightning.model.transformer import Transformer

FEW = 32  # routed tokens (tokens times experts per token) up to which one product for each is the fastest


def lay_by_columns(model: Transformer) -> Transformer:
    """Lays the weights out in column-major order, in place: on CPUs products of few rows then read them faster.

    A matrix that several products read, or a tied embedding, keeps its layout.
    """
    for name, module in model.named_modules():
        embedded = module is model.lm_head and model.config.tie_word_embeddings
        if isinstance(module, nn.Linear) and not name.endswith("kv_b_proj") and not embedded:
            module.weight.data = module.weight.data.t().contiguous().t()
    return model


class Norm:
    """RMSNorm. On CPUs torch takes seven operations; x · (w √D) / hypot(|x|, √(D ε)) is equal and takes four."""

    def __init__(self, norm: nn.Module) -> None:
        assert isinstance(norm, RMSNorm)
        self.norm, size = norm, len(norm.weight)
        self.short = norm.weight.device.type == "cpu" and norm.weight.dtype == torch.float32
        self.gain = norm.weight * size**0.5
        self.floor = torch.tensor((size * norm.eps) ** 0.5)

    def __call__(self, x: Tensor) -> Tensor:
        if not self.short:
            return self.norm(x)
        return x * (self.gain / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.floor))


class LatentAttention:
    """MLA with W_UK and W_UV absorbed (V3 §2.1.1): queries attend to the latents directly."""

    def __init__(self, attention: MultiHeadLatentAttention) -> None:
        self.heads, self.rank, self.scale = attention.heads, attention.kv_rank, attention.scale
        self.sizes, self.interleave = (attention.nope_size, attention.rope_size), attention.interleave
        self.compressed = attention.compresses_queries
        if self.compressed:
            self.w_dq, self.q_norm = attention.q_a_proj.weight, Norm(attention.q_a_layernorm)
        self.w_uq = (attention.q_b_proj if self.compressed else attention.q_proj).weight
        self.w_dkv, self.kv_norm = attention.kv_a_proj_with_mqa.weight, Norm(attention.kv_a_layernorm)
        up = attention.kv_b_proj.weight.unflatten(0, (self.heads, -1))
        self.w_uk, w_uv = up.split((attention.nope_size, attention.v_size), 1)
        self.w_uv, self.w_o = w_uv.mT, attention.o_proj.weight

    def __call__(self, x_BTD: Tensor, entries_BUC: Tensor, step: Step, only_last: bool) -> Tensor:
        c_kv, k_r = F.linear(x_BTD, self.w_dkv).split((self.rank, self.sizes[1]), -1)
        c_q = self.q_norm(F.linear(x_BTD, self.w_dq)) if self.compressed else x_BTD
        q_c, q_r = F.linear(c_q, self.w_uq).unflatten(-1, (self.heads, -1)).split(self.sizes, -1)
        turned = apply_rope(torch.cat((q_r, k_r[:, :, None]), 2), step.rotation, self.interleave)
        q_r, k_r = turned.split((self.heads, 1), 2)
        latents_BUC = step.append(entries_BUC, torch.cat((self.kv_norm(c_kv), k_r[:, :, 0]), -1))
        if only_last:
            q_c, q_r, step = q_c[:, -1:], q_r[:, -1:], step.of_last()
        q_c, q_r = q_c.transpose(1, 2), q_r.transpose(1, 2)
        if step.start == 0 and step.T > 1:  # prompts: expanded as in training, which takes fewer FLOP
            c_kv, k_r = latents_BUC[:, None].split((self.rank, self.sizes[1]), -1)
            k_BHTC = torch.cat((c_kv @ self.w_uk.mT, k_r.expand(-1, self.heads, -1, -1)), -1)
            out_BHTC = causal_attention(torch.cat((q_c, q_r), -1), k_BHTC, c_kv @ self.w_uv, self.scale)
        else:
            q_BHTC = torch.cat((q_c @ self.w_uk, q_r), -1)
            weights = softmax(q_BHTC.flatten(1, 2) @ latents_BUC.mT, self.scale, self.heads, step)
            mixed_BHTC = (weights @ latents_BUC[..., : self.rank]).unflatten(1, (self.heads, -1))
            out_BHTC = mixed_BHTC @ self.w_uv
        return F.linear(out_BHTC.transpose(1, 2).flatten(2), self.w_o)


class SharedAttention:
    """Grouped-query attention: several heads share each key and value of the cache."""

    def __init__(self, attention: GroupedQueryAttention) -> None:
        self.attention = attention

    def __call__(self, x_BTD: Tensor, entries_BUC: Tensor, step: Step, only_last: bool) -> Tensor:
        attention, shared = self.attention, self.attention.kv_heads
        k, v = attention.keys_values(x_BTD, step.rotation_of_heads)
        entries = step.append(entries_BUC, torch.cat([x.transpose(1, 2).flatten(2) for x in (k, v)], -1))
        if only_last:
            x_BTD, step = x_BTD[:, -1:], step.of_last()
        keys, values = entries.split((shared * k.shape[3], shared * v.shape[3]), -1)
        k, v = (x.unflatten(-1, (shared, -1)).transpose(1, 2) for x in (keys, values))
        q = attention.queries(x_BTD, step.rotation_of_heads).unflatten(1, (shared, -1)).flatten(2, 3)
        weights = softmax((q @ k.mT).flatten(1, 2), attention.scale, attention.heads, step)
        out_BHTC = (weights.unflatten(1, (shared, -1)) @ v).flatten(1, 2).unflatten(1, (attention.heads, -1))
        return attention.o_proj(out_BHTC.transpose(1, 2).flatten(2))


def softmax(products: Tensor, scale: float, heads: int, step: Step) -> Tensor:
    """Causal softmax of attention scores; N runs over heads and, within them, new tokens."""
    scores = products.float() * scale
    if step.hidden_BTU is not None:
        hidden = step.hidden_BTU[:, None]
        scores = scores.unflatten(1, (heads, -1)).masked_fill(hidden, -torch.inf).flatten(1, 2)
    return F.softmax(scores, -1).to(products.dtype)


class Dense:
    """SwiGLU."""

    def __init__(self, mlp: MLP) -> None:
        self.w_gate, self.w_up, self.w_down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.w_gate)) * F.linear(x, self.w_up), self.w_down)


class Mixture:
    """DeepSeekMoE without training-only computations. chosen: the experts of each pass, [B, T, K], where a list is."""

    chosen: list[Tensor] | None = None

    def __init__(self, moe: MoE) -> None:
        self.config, self.experts, self.dispatcher = moe.config, moe.experts, moe.dispatcher
        self.router, self.expert_bias = moe.gate.weight.float(), moe.gate.expert_bias
        self.gate_up, self.down = moe.experts.gate_up_proj.unbind(), moe.experts.down_proj.unbind()
        self.shared = None if moe.shared_experts is None else Dense(moe.shared_experts)

    def __call__(self, u_BTD: Tensor) -> Tensor:
        u_ND = u_BTD.flatten(0, 1)
        logits_NE = F.linear(u_ND.float(), self.router)
        scores_NE = logits_NE.sigmoid() if self.config.scoring_func == "sigmoid" else logits_NE.softmax(-1)
        experts_NK, gates_NK = route(scores_NE, self.expert_bias, self.config)
        if self.chosen is not None:
            self.chosen.append(experts_NK.unflatten(0, u_BTD.shape[:2]))
        if u_ND.device.type == "cpu" and experts_NK.numel() <= FEW:
            out_ND = self.few_tokens(u_ND, experts_NK, gates_NK)
        else:
            sent = self.dispatcher.dispatch(u_ND, experts_NK, gates_NK)
            y_RD = self.experts(*self.dispatcher.receive(sent))
            out_ND = self.dispatcher.combine(self.dispatcher.send_back(y_RD, sent))
        if self.shared is not None:
            out_ND = out_ND + self.shared(u_ND)
        return out_ND.view_as(u_BTD)

    def few_tokens(self, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor) -> Tensor:
        """Computes one product per chosen expert: on CPUs torch's grouped product is slower for few tokens."""
        K = experts_NK.shape[1]
        chosen, rows = experts_NK.flatten().tolist(), x_ND.split(1)
        gate, up = torch.cat([torch.mm(rows[s // K], self.gate_up[e]) for s, e in enumerate(chosen)]).chunk(2, -1)
        inner = (F.silu(gate) * up).split(1)
        y_RD = torch.cat([torch.mm(inner[s], self.down[e]) for s, e in enumerate(chosen)])
        return (gates_NK[:, None].to(y_RD.dtype) @ y_RD.unflatten(0, (-1, K))).squeeze(1)


ATTENTION: dict[type, Callable] = {
    MultiHeadLatentAttention: LatentAttention,
    GroupedQueryAttention: SharedAttention,
}


class Layer:
    """A block: norm, attention, norm, and MLP or experts."""

    def __init__(self, block: nn.Module) -> None:
        assert isinstance(block, Block)
        self.norm, self.mlp_norm = Norm(block.input_layernorm), Norm(block.post_attention_layernorm)
        self.attention = ATTENTION[type(block.self_attn)](block.self_attn)
        self.mlp = Mixture(block.mlp) if isinstance(block.mlp, MoE) else Dense(block.mlp)

    def __call__(self, x_BTD: Tensor, entries_BUC: Tensor, step: Step, only_last: bool = False) -> Tensor:
        """The output of the new tokens, [B, T, D], or with only_last of the last one. Attention is causal."""
        seen_BTD = self.attention(self.norm(x_BTD), entries_BUC, step, only_last)
        x_BTD = (x_BTD[:, -1:] if only_last else x_BTD) + seen_BTD
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class DraftModule:
    """An MTP module for drafting."""

    def __init__(self, module: nn.Module) -> None:
        assert isinstance(module, MTPModule)
        self.enorm, self.hnorm, self.norm = Norm(module.enorm), Norm(module.hnorm), Norm(module.norm)
        self.eh_proj, self.layer = module.eh_proj.weight, Layer(module.block)

    def __call__(self, embedding: Tensor, h_BTD: Tensor, entries_BUC: Tensor, step: Step, only_last: bool) -> Tensor:
        joined = F.linear(torch.cat((self.enorm(embedding), self.hnorm(h_BTD)), -1), self.eh_proj)
        return self.layer(joined, entries_BUC, step, only_last)
