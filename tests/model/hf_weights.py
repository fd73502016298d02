"""The same model in transformers: our configuration and weights under its names, written out pair by pair.

Independent of the export, on purpose: both can be compared with this.
"""

from dataclasses import asdict

import torch
from torch import Tensor, nn

from dsv3_lightning.model.block import Block
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.moe import MoE
from dsv3_lightning.model.transformer import Transformer


def hf_config(config: ModelConfig):
    """DeepseekV3Config or, for softmax affinities, DeepseekV2Config, as a released config.json would give it."""
    from transformers import DeepseekV2Config, DeepseekV3Config

    fields = asdict(config)
    for name in ("scoring_func", "rope_scaling", "num_nextn_predict_layers"):
        del fields[name]
    if config.rope_scaling is not None:
        # A weight that was not given is absent from the file, too.
        fields["rope_scaling"] = {
            k: v for k, v in asdict(config.rope_scaling).items() if v or k not in ("mscale", "mscale_all_dim")
        }
    fields["num_key_value_heads"] = config.num_attention_heads
    fields["num_mtp_layers"] = config.mtp_depth
    fields["attn_implementation"] = "eager"
    if config.scoring_func == "sigmoid":
        del fields["topk_method"]
        return DeepseekV3Config(**fields)
    del fields["rope_interleave"], fields["num_mtp_layers"]
    return DeepseekV2Config(**fields)


def hf_model(model: Transformer) -> nn.Module:
    """DeepseekV3ForCausalLM or DeepseekV2ForCausalLM with the weights of `model`, its experts as a plain loop."""
    from transformers import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM

    config = hf_config(model.config)
    config._experts_implementation = "eager"
    theirs = (DeepseekV3ForCausalLM if model.config.scoring_func == "sigmoid" else DeepseekV2ForCausalLM)(config)
    theirs.load_state_dict(hf_state(model), strict=True)
    return theirs.eval()


def hf_state(model: Transformer) -> dict[str, Tensor]:
    state = {
        "model.embed_tokens.weight": model.embed_tokens.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.lm_head.weight,
    }
    for i, block in enumerate(model.layers):
        state |= hf_block_state(block, f"model.layers.{i}.", with_bias=model.config.scoring_func == "sigmoid")
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def hf_mtp_state(model: Transformer) -> dict[str, Tensor]:
    """For transformers' MtpModel, whose embedding and head are those of the main model it is given."""
    state = {"embed_tokens.weight": model.embed_tokens.weight, "shared_head.weight": model.lm_head.weight}
    for i, module in enumerate(model.mtp):
        at = f"layers.{i}."
        state |= {f"{at}{name}.weight": getattr(module, name).weight for name in ("enorm", "hnorm", "eh_proj")}
        state |= {f"{at}post_norm.weight": module.norm.weight} | hf_block_state(module.block, f"{at}mtp_block.", True)
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def hf_block_state(block: Block, at: str, with_bias: bool) -> dict[str, Tensor]:
    attention = {name: p for name, p in block.self_attn.named_parameters()}  # named as in the released checkpoint
    state = {f"{at}self_attn.{name}": parameter for name, parameter in attention.items()}
    for name in ("input_layernorm", "post_attention_layernorm"):
        state[f"{at}{name}.weight"] = getattr(block, name).weight
    if not isinstance(block.mlp, MoE):
        return state | {f"{at}mlp.{name}.weight": getattr(block.mlp, name).weight for name in MLP_NAMES}
    moe = block.mlp
    state[f"{at}mlp.gate.weight"] = moe.gate.weight
    if with_bias:
        state[f"{at}mlp.gate.e_score_correction_bias"] = moe.gate.expert_bias
    # [E, in, out] here, [E, out, in] there; gate before up in both.
    state[f"{at}mlp.experts.gate_up_proj"] = moe.experts.gate_up_proj.transpose(1, 2)
    state[f"{at}mlp.experts.down_proj"] = moe.experts.down_proj.transpose(1, 2)
    for name in MLP_NAMES:
        weight = getattr(moe.shared_experts, name).weight if moe.shared_experts is not None else None
        if weight is None:  # there, no shared expert is one of width 0
            D = block.input_layernorm.weight.shape[0]
            weight = torch.empty((D, 0) if name == "down_proj" else (0, D))
        state[f"{at}mlp.shared_experts.{name}.weight"] = weight
    return state


MLP_NAMES = ("gate_proj", "up_proj", "down_proj")
