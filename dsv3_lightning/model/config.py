"""ModelConfig: the shape of a DeepSeek-V3-family model, under Hugging Face's field names. Imports no torch.

Sources: V3 arXiv 2412.19437 §4.2, V2 arXiv 2405.04434 §3.1.2, and the released `config.json` files.
"""

from dataclasses import dataclass
from typing import Literal

from dsv3_lightning.model.checks import check_model, check_yarn


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN context extension of the decoupled rotary keys (V3 §4.3; arXiv 2309.00071).

    factor: new length over `original_max_position_embeddings`.
    beta_fast, beta_slow: rotations within the original length above which a frequency is kept and below which it is
        divided by `factor`; the report calls them β = 32 and α = 1.
    mscale, mscale_all_dim: weights of ln(factor). The rotary part is multiplied by the ratio of the two mscales (by
        0.1 ln(factor) + 1 where one of them is 0), the softmax scale by mscale_all_dim's, squared (not where it is 0).
    """

    type: Literal["yarn"] = "yarn"
    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        check_yarn(self)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that decides the parameters and the function of the model. Raises ConfigError on impossible shapes.

    vocab_size V; hidden_size D; num_hidden_layers L, of which the first `first_k_dense_replace` are dense with
        `intermediate_size` and the others MoE.
    attention: `mla` (V3 §2.1.1), or `gqa`, the older family's grouped-query attention (arXiv 2401.02954 §2.2).
    num_attention_heads H; qk_nope_head_dim, qk_rope_head_dim, v_head_dim: channels of a head's queries and keys that
        stay, that rotate, and of its values. mla: q_lora_rank (None: queries are not compressed) and kv_lora_rank.
        gqa: num_key_value_heads; H is multi-head, 1 multi-query attention.
    n_routed_experts E, num_experts_per_tok K, n_shared_experts, moe_intermediate_size F: DeepSeekMoE (V3 §2.1.2); not
        needed where all layers are dense.
    scoring_func: affinities by sigmoid (V3) or by softmax over all experts (V2).
    topk_method: `noaux_tc` adds the expert bias to the choice and scores a group by its two best experts (V3);
        `group_limited_greedy` scores a group by its best (V2); `greedy` ignores groups (V2-Lite).
    expert_bias_kind: the choice is by s + b (V3 eq. 16) or by s · (1 + b), a variant of arXiv 2408.15664 §4.3.
    n_group G, topk_group M: each token's experts come from at most M of G equal groups.
    norm_topk_prob, routed_scaling_factor: gates are normalized to sum to 1, then scaled.
    num_nextn_predict_layers: depth of multi-token prediction (V3 §2.2); 0 switches it off.
    mtp_kind: `sequential` modules that see the tokens between (V3 §2.2), or `parallel` heads (arXiv 2404.19737).
    max_position_embeddings: longest sequence. rope_theta, rope_scaling: rotary base and YaRN.
    rope_interleave: rotary pairs are neighboring channels, as in the released weights; False: halves.
    initializer_range: standard deviation of every matrix at the start (V3 §4.2: 0.006).
    tie_word_embeddings: the output head is the embedding.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    attention: Literal["mla", "gqa"] = "mla"
    num_key_value_heads: int | None = None
    kv_lora_rank: int = 0
    q_lora_rank: int | None = None
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    first_k_dense_replace: int = 0
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "noaux_tc"
    expert_bias_kind: Literal["additive", "multiplicative"] = "additive"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0

    num_nextn_predict_layers: int = 0
    mtp_kind: Literal["sequential", "parallel"] = "sequential"
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rope_scaling: Yarn | None = None
    rope_interleave: bool = True
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    tie_word_embeddings: bool = False

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def mtp_depth(self) -> int:
        """How many tokens beyond the next one are predicted; the report calls it D."""
        return self.num_nextn_predict_layers

    @property
    def num_moe_layers(self) -> int:
        """MoE layers of the main model and of the MTP modules, in that order: the rows of every `_LE` tensor."""
        return self.num_hidden_layers - self.first_k_dense_replace + self.mtp_depth

    def __post_init__(self) -> None:
        check_model(self)
