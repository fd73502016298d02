"""Conversion between config.json and ModelConfig for DeepSeek-V3, V2 and Llama (the dense family). Imports no torch.

A file with features that our model lacks is refused. For a field that it leaves out, a note names the default taken.
"""

from dataclasses import MISSING, asdict, fields
from typing import Any, NamedTuple

from dsv3_lightning.common.json_files import shown
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.hub.fields import fit, section, typed
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
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
FIXED = {  # the only supported values of fields that our model has no setting for
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "moe_layer_freq": 1,
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
}
# Fields that don't affect the model's function, or are read elsewhere. A run sets its own loss weights.
OTHERS = (
    "architectures model_type auto_map torch_dtype dtype transformers_version use_cache quantization_config "
    "bos_token_id eos_token_id pad_token_id ep_size aux_loss_alpha seq_aux head_dim num_key_value_heads rope_scaling "
    "rope_parameters rope_interleave _name_or_path output_router_logits qk_head_dim chunk_size_feed_forward id2label "
    "label2id is_encoder_decoder output_attentions output_hidden_states problem_type return_dict num_mtp_layers "
    "routed_scaling_factor router_aux_loss_coef"
).split()


class Described(NamedTuple):
    """The model of a folder. interleaved: True if rotary channels are stored as neighboring pairs. notes: lines for the
    user."""

    config: ModelConfig
    interleaved: bool
    notes: list[str]


def family(config: ModelConfig) -> str:
    """The model_type in transformers that computes the same function. Raises ConfigError if there is none."""
    if config.attention == "gqa":
        for name, wanted in (("num_moe_layers", 0), ("qk_nope_head_dim", 0), ("rope_scaling", None)):
            if getattr(config, name) != wanted:
                raise ConfigError(
                    f"model.attention=gqa with {name}={getattr(config, name)}: no released architecture has this; "
                    "Llama's has no experts, rotates all channels, and has no YaRN"
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
    """True if exports store rotary channels as pairs, which depends on the family, not on `model.rope_interleave`."""
    return family(config) != "llama"


def to_json(config: ModelConfig, tokens: dict[str, int | None], dtype: str) -> dict[str, Any]:
    """The content of config.json. tokens: bos_token_id, eos_token_id and so on. Raises ConfigError as `family` does.

    dtype: of the weights; with `fp8` what isn't FP8 is bfloat16, as in the released V3.
    """
    kind = family(config)
    content: dict[str, Any] = {"architectures": [FAMILIES[kind]], "model_type": kind, "torch_dtype": dtype, **tokens}
    if dtype == "fp8":
        content |= {"torch_dtype": "bfloat16", "quantization_config": FP8}
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
    """The rope_scaling object, without weights of 0: readers take an absent one as 0 or as their default."""
    if yarn is None:
        return None
    return {name: value for name, value in asdict(yarn).items() if value or name not in ("mscale", "mscale_all_dim")}


def from_json(content: dict[str, Any], where: str) -> Described:
    """The model that config.json describes. where: the file, for messages. Raises ConfigError if it isn't supported."""
    try:
        described = describe(content)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return described._replace(notes=[f"{where}: {note}" for note in described.notes])


def describe(content: dict[str, Any]) -> Described:
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ConfigError(f"model_type={kind if isinstance(kind, str) else shown(kind)}: must be {', '.join(FAMILIES)}")
    for name, value in FIXED.items():
        if content.get(name) is not None and content[name] != value:
            found = content[name] if isinstance(content[name], str) else shown(content[name])
            raise ConfigError(f"{name}={found}: only {value} is supported")
    known = {*SHAPE, *LATENT, *EXPERTS, *FIXED, *OTHERS}
    unread = sorted(name for name in content if name not in known)
    notes = [f"not used: {', '.join(unread)}"] if unread else []
    given = {name: content[name] for name in SHAPE if name in content}
    if kind == "llama":
        given |= llama_fields(content)
        interleaved = False
    else:
        given |= {name: content[name] for name in (*LATENT, *EXPERTS) if content.get(name) is not None}
        given.setdefault("scoring_func", "sigmoid" if kind == "deepseek_v3" else "softmax")
        given.setdefault("topk_method", "noaux_tc" if kind == "deepseek_v3" else "greedy")
        given.setdefault("norm_topk_prob", kind == "deepseek_v3")
        if content.get("num_mtp_layers") is not None:
            given.setdefault("num_nextn_predict_layers", content["num_mtp_layers"])
        if "n_shared_experts" in content:  # null means none
            given.setdefault("n_shared_experts", 0)
        if given["topk_method"] == "greedy":  # greedy ignores groups, even if the file has some
            given |= {"n_group": 1, "topk_group": 1}
        interleaved = fit(content.get("rope_interleave", True), bool, "rope_interleave")
    needed = [f.name for f in fields(ModelConfig) if f.default is MISSING and f.name not in given]
    if needed:
        raise ConfigError(f"lacks {', '.join(needed)}")
    given = typed(ModelConfig, given)
    theta, yarn, more = rope_from_json(content, kind)
    given |= {"rope_theta": theta, "rope_scaling": yarn}
    absent = [] if kind == "llama" else [n for n in (*SHAPE, *EXPERTS) if n not in content and n != "rope_theta"]
    config = ModelConfig(**given, rope_interleave=interleaved)
    if config.attention == "mla" and content.get("num_key_value_heads") not in (None, config.num_attention_heads):
        raise ConfigError(
            f"num_key_value_heads={shown(content['num_key_value_heads'])}: must be "
            f"num_attention_heads={config.num_attention_heads}, since MLA has keys for each"
        )
    notes += more
    if absent:
        notes.append("absent, so taken as " + ", ".join(f"{n}={getattr(config, n)}" for n in absent))
    return Described(config, interleaved, notes)


def llama_fields(content: dict[str, Any]) -> dict[str, Any]:
    names = ("num_attention_heads", "hidden_size", "num_hidden_layers")
    if absent := [name for name in names if content.get(name) is None]:
        raise ConfigError(f"lacks {', '.join(absent)}")
    heads, hidden, layers = (fit(content[name], int, name) for name in names)
    if heads < 1:
        raise ConfigError(f"num_attention_heads={heads}: must be at least 1")
    size = content.get("head_dim") or hidden // heads
    return {
        "attention": "gqa",
        "num_key_value_heads": content.get("num_key_value_heads") or heads,
        "qk_nope_head_dim": 0,
        "qk_rope_head_dim": fit(size, int, "head_dim"),
        "v_head_dim": size,
        "first_k_dense_replace": layers,
    }


def rope_from_json(content: dict[str, Any], kind: str) -> tuple[float, Yarn | None, list[str]]:
    """RoPE base, YaRN and notes, from `rope_theta` and `rope_scaling`, or from `rope_parameters` (transformers 5).

    As in transformers, YaRN's original length defaults to max_position_embeddings.
    """
    given = section(content, "rope_scaling") | section(content, "rope_parameters")
    theta = fit(given.pop("rope_theta", content.get("rope_theta", 10000.0)), float, "rope_theta")
    kinds = [given.pop(name) for name in ("type", "rope_type") if given.get(name) is not None]
    if all(word == "default" for word in kinds):
        return theta, None, []
    if any(word != "yarn" for word in kinds) or kind == "llama":
        words = sorted({word if isinstance(word, str) else shown(word) for word in kinds})
        raise ConfigError(f"rope_scaling type {', '.join(words)}: only MLA's yarn is supported")
    given = {name: value for name, value in given.items() if value is not None}
    if (truncate := given.pop("truncate", True)) is not True:
        raise ConfigError(f"rope_scaling.truncate={shown(truncate)}: is not supported")
    names = {field.name for field in fields(Yarn)}
    if unknown := sorted(name for name in given if name not in names):
        raise ConfigError(f"rope_scaling.{unknown[0]}: is not supported")
    if "factor" not in given:
        raise ConfigError("rope_scaling lacks factor")
    notes = []
    if "original_max_position_embeddings" not in given:
        length = given["original_max_position_embeddings"] = content["max_position_embeddings"]
        notes.append(f"rope_scaling.original_max_position_embeddings is absent, so taken as {length}")
    return theta, Yarn(**typed(Yarn, given, "rope_scaling.")), notes
