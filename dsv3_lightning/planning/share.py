"""The part of a model that a rank or a chunk of a pipeline computes."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.planning.parameters import attention_weights, block_norms, moe_parts, mtp_norms, swiglu


class Share(NamedTuple):
    """Numbers of layers and ends. dense, moe: layers of the main model by their FFN. mtp: MTP modules. heads: losses.

    embedding: 1 where the embedding is.
    """

    dense: int
    moe: int
    mtp: int
    heads: int
    embedding: int

    @property
    def layers(self) -> int:
        """Layers with attention."""
        return self.dense + self.moe + self.mtp

    @property
    def moe_layers(self) -> int:
        """MoE layers, with those of MTP modules."""
        return self.moe + self.mtp


def whole_share(model: ModelConfig) -> Share:
    dense, depth = model.first_k_dense_replace, model.mtp_depth
    return Share(dense, model.num_hidden_layers - dense, depth, 1 + depth, 1)


def chunk_shares(model: ModelConfig, layers: Sequence[int]) -> list[Share]:
    """The share of each chunk of a pipeline. layers: the number of consecutive layers of each."""
    shares, start, depth = [], 0, model.mtp_depth
    for count in layers:
        dense = min(count, max(0, model.first_k_dense_replace - start))
        shares.append(Share(dense, count - dense, 0, 0, 0))
        start += count
    shares[0] = shares[0]._replace(embedding=1)
    shares[-1] = shares[-1]._replace(mtp=depth, heads=1 + depth)
    return shares


def together(shares: Iterable[Share]) -> Share:
    """The share of a rank that has these."""
    return Share(*(sum(numbers) for numbers in zip(*shares, strict=True)))


def share_parameters(model: ModelConfig, share: Share) -> tuple[int, int]:
    """Numbers of parameters of a share: all but routed experts, and routed experts."""
    D, V, moe = model.hidden_size, model.vocab_size, moe_parts(model)
    ends = share.embedding * V * D + bool(share.heads) * (D + (0 if model.tie_word_embeddings else V * D))
    blocks = share.layers * (attention_weights(model) + block_norms(model))
    dense = share.dense * swiglu(D, model.intermediate_size)
    others = share.moe_layers * (moe["shared experts"].total + moe["router"].total)
    joining = share.mtp * 2 * D * D if model.mtp_kind == "sequential" else 0
    norms = share.mtp * mtp_norms(model)
    return ends + blocks + dense + others + joining + norms, share.moe_layers * moe["routed experts"].total


def linear_weights(model: ModelConfig, share: Share) -> int:
    """The number of weights in the linear layers of a share's blocks."""
    dense = share.dense * swiglu(model.hidden_size, model.intermediate_size)
    shared = share.moe_layers * moe_parts(model)["shared experts"].total
    return share.layers * attention_weights(model) + dense + shared


def small_parameters(model: ModelConfig, share: Share) -> int:
    """The number of parameters in norms and routers, which a mesh shards within a node and keeps in fp32."""
    norms = share.layers * block_norms(model) + bool(share.heads) * model.hidden_size + share.mtp * mtp_norms(model)
    return norms + share.moe_layers * moe_parts(model)["router"].total
