"""config.json to and from ModelConfig: DeepSeek-V3, V2 and, for the older dense family, Llama. Imports no torch.

What such a file can say and our model doesn't do is refused; what it leaves out is named with the value taken.
"""

from dataclasses import MISSING, asdict, fields
from typing import Any, NamedTuple

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.model.config import ModelConfig, Yarn

SHAPE = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size max_position_embeddings "
    "rms_norm_eps initializer_range tie_word_embeddings rope_theta"
).split()
LATENT = "q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim first_k_dense_replace".split()
EXPERTS = (
    "n_routed_experts num_experts_per_tok moe_intermediate_size n_shared_experts n_group topk_group scoring_func "
    "topk_method norm_topk_prob routed_scaling_factor num_nextn_predict_layers"
).split()
FAMILIES = {"deepseek_v3": "DeepseekV3ForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM", "llama": "LlamaForCausalLM"}
FIXED = {  # what our model does, and such a file may say otherwise
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "moe_layer_freq": 1,
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
}
# Of no consequence to the function, or read elsewhere. Loss weights are a run's own: `loss.balance_factor`.
OTHERS = (
    "architectures model_type auto_map torch_dtype dtype transformers_version use_cache quantization_config "
    "bos_token_id eos_token_id pad_token_id ep_size aux_loss_alpha seq_aux head_dim num_key_value_heads rope_scaling "
    "rope_parameters rope_interleave _name_or_path output_router_logits qk_head_dim chunk_size_feed_forward id2label "
    "label2id is_encoder_decoder output_attentions output_hidden_states problem_type return_dict num_mtp_layers "
    "routed_scaling_factor router_aux_loss_coef"
).split()


class Described(NamedTuple):
    """config: the model of a folder. interleaved: whether its rotary channels are stored as neighboring pairs.
    notes: what to tell the user, a line each."""

    config: ModelConfig
    interleaved: bool
    notes: list[str]


def family(config: ModelConfig) -> str:
    """The model_type that has this function in transformers. Raises ConfigError where there is none."""
    if config.attention == "gqa":
        for name, wanted in (("num_moe_layers", 0), ("qk_nope_head_dim", 0), ("rope_scaling", None)):
            if getattr(config, name) != wanted:
                raise ConfigError(
                    f"model.attention=gqa with {name}={getattr(config, name)}: no released architecture is like that; "
                    "the Llama-shaped one has no experts, turns all channels, and has no YaRN"
                )
        if config.v_head_dim != config.qk_head_dim:
            raise ConfigError(f"model.v_head_dim={config.v_head_dim}: Llama's is qk_rope_head_dim={config.qk_head_dim}")
        return "llama"
    if config.mtp_depth and config.mtp_kind != "sequential":
        raise ConfigError(f"model.mtp_kind={config.mtp_kind}: released checkpoints have sequential modules only")
    if config.expert_bias_kind != "additive":
        raise ConfigError(f"model.expert_bias_kind={config.expert_bias_kind}: released models add the bias")
    biased = config.topk_method == "noaux_tc" or config.n_group == 1
    if config.scoring_func == "sigmoid" and biased:
        return "deepseek_v3"
    if config.scoring_func == "softmax" and config.topk_method != "noaux_tc" and not config.norm_topk_prob:
        return "deepseek_v2"
    raise ConfigError(
        f"model.scoring_func={config.scoring_func} with topk_method={config.topk_method}, "
        f"norm_topk_prob={str(config.norm_topk_prob).lower()}: transformers has no such router; it has sigmoid with "
        "noaux_tc (V3), and softmax with greedy or group_limited_greedy and gates that are not normalized (V2)"
    )


def interleaved_on_disk(config: ModelConfig) -> bool:
    """Exports hold the layout that every reader of the family expects, whatever the model computes with."""
    return family(config) != "llama"


def to_json(config: ModelConfig, tokens: dict[str, int | None], dtype: str) -> dict[str, Any]:
    """The content of config.json. tokens: bos_token_id and its like. Raises ConfigError, see `family`."""
    kind = family(config)
    content: dict[str, Any] = {"architectures": [FAMILIES[kind]], "model_type": kind, "torch_dtype": dtype, **tokens}
    content |= {name: getattr(config, name) for name in SHAPE}
    content |= {"num_key_value_heads": config.num_key_value_heads or config.num_attention_heads}
    content |= {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "use_cache": True}
    if kind == "llama":
        return content | {"head_dim": config.qk_head_dim, "mlp_bias": False}
    content |= {name: getattr(config, name) for name in (*LATENT, *EXPERTS)} | {"moe_layer_freq": 1}
    if kind == "deepseek_v3":
        content |= {"topk_method": "noaux_tc", "rope_interleave": True}
    content["rope_scaling"] = yarn_to_json(config.rope_scaling)
    return content


def yarn_to_json(yarn: Yarn | None) -> dict[str, Any] | None:
    """A weight of 0 is one that is absent: readers take it for 0, or for their own default."""
    if yarn is None:
        return None
    return {name: value for name, value in asdict(yarn).items() if value or name not in ("mscale", "mscale_all_dim")}


def from_json(content: dict[str, Any], where: str) -> Described:
    """where: the file, for messages. Raises ConfigError where the model would not be ours."""
    try:
        described = describe(content)
    except (ValueError, TypeError, AttributeError) as error:  # also of values of another type than they should have
        raise ConfigError(f"{where}: {error}") from error
    return described._replace(notes=[f"{where}: {note}" for note in described.notes])


def describe(content: dict[str, Any]) -> Described:
    kind = content.get("model_type")
    if kind not in FAMILIES:
        raise ConfigError(f"model_type={kind}: must be {', '.join(FAMILIES)}")
    for name, value in FIXED.items():
        if content.get(name, value) != value:
            raise ConfigError(f"{name}={content[name]}: only {value} is supported")
    known = {*SHAPE, *LATENT, *EXPERTS, *FIXED, *OTHERS}
    unread = sorted(name for name in content if name not in known)
    notes = [f"not used: {', '.join(unread)}"] if unread else []
    theta, yarn = rope_from_json(content)
    given = {name: content[name] for name in SHAPE if name in content} | {"rope_theta": theta, "rope_scaling": yarn}
    if kind == "llama":
        given |= llama_fields(content)
        interleaved = False
    else:
        given |= {name: content[name] for name in (*LATENT, *EXPERTS) if content.get(name) is not None}
        given.setdefault("scoring_func", "sigmoid" if kind == "deepseek_v3" else "softmax")
        given.setdefault("topk_method", "noaux_tc" if kind == "deepseek_v3" else "greedy")
        given.setdefault("norm_topk_prob", kind == "deepseek_v3")
        if "num_mtp_layers" in content:
            given.setdefault("num_nextn_predict_layers", content["num_mtp_layers"])
        if given["topk_method"] == "greedy":  # which ignores groups, also where the file names some
            given |= {"n_group": 1, "topk_group": 1}
        interleaved = bool(content.get("rope_interleave", True))
    needed = [f.name for f in fields(ModelConfig) if f.default is MISSING and f.name not in given]
    if needed:
        raise ConfigError(f"lacks {', '.join(needed)}")
    absent = [] if kind == "llama" else [n for n in (*SHAPE, *EXPERTS) if n not in content and n != "rope_theta"]
    config = ModelConfig(**given, rope_interleave=interleaved)
    if absent:
        notes.append("absent, so taken as " + ", ".join(f"{n}={getattr(config, n)}" for n in absent))
    return Described(config, interleaved, notes)


def llama_fields(content: dict[str, Any]) -> dict[str, Any]:
    heads = content.get("num_attention_heads", 0)
    if not heads or "hidden_size" not in content or "num_hidden_layers" not in content:
        raise ConfigError("lacks num_attention_heads, hidden_size or num_hidden_layers")
    size = content.get("head_dim") or content["hidden_size"] // heads
    return {
        "attention": "gqa",
        "num_key_value_heads": content.get("num_key_value_heads") or heads,
        "qk_nope_head_dim": 0,
        "qk_rope_head_dim": size,
        "v_head_dim": size,
        "first_k_dense_replace": content["num_hidden_layers"],
    }


def rope_from_json(content: dict[str, Any]) -> tuple[float, Yarn | None]:
    """Base and YaRN: `rope_theta` and `rope_scaling`, or `rope_parameters`, as transformers 5 writes."""
    given = dict(content.get("rope_scaling") or {}) | dict(content.get("rope_parameters") or {})
    theta = float(given.pop("rope_theta", None) or content.get("rope_theta", 10000.0))
    kinds = {given.pop(name) for name in ("type", "rope_type") if name in given}
    if kinds <= {"default"}:
        return theta, None
    if kinds != {"yarn"} or content["model_type"] == "llama":
        raise ConfigError(f"rope_scaling type {', '.join(sorted(kinds))}: only MLA's yarn is supported")
    if given.pop("truncate", True) is not True:
        raise ConfigError("rope_scaling.truncate=false: is not supported")
    names = {field.name for field in fields(Yarn)}
    if unknown := sorted(name for name, value in given.items() if name not in names and value is not None):
        raise ConfigError(f"rope_scaling.{unknown[0]}: is not supported")
    try:
        return theta, Yarn(**{name: value for name, value in given.items() if value is not None})
    except TypeError as error:
        raise ConfigError("rope_scaling lacks factor or original_max_position_embeddings") from error
