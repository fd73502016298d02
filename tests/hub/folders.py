"""Small models as Hugging Face folders."""

from pathlib import Path

import torch

from dsv3_lightning.hub.config import to_json
from dsv3_lightning.hub.export import DTYPES, Read, write_folder, write_weights
from dsv3_lightning.hub.folder import HubFolder
from dsv3_lightning.hub.tokens import write_json
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.init import fill
from dsv3_lightning.model.transformer import Transformer
from tests.model.small import small_config, small_model

V2 = {"scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 16.0}
V2_GROUPS = V2 | {"topk_method": "group_limited_greedy"}
V2_LITE = V2 | {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "q_lora_rank": None, "n_shared_experts": 2}
LLAMA = {
    "attention": "gqa", "num_key_value_heads": 2, "num_attention_heads": 4, "kv_lora_rank": 0, "q_lora_rank": None,
    "qk_nope_head_dim": 0, "qk_rope_head_dim": 10, "v_head_dim": 10, "first_k_dense_replace": 3, "n_routed_experts": 0,
    "num_experts_per_tok": 0, "moe_intermediate_size": 0, "n_group": 1, "topk_group": 1, "hidden_size": 48,
    "rope_interleave": False, "routed_scaling_factor": 1.0,
}  # fmt: skip


def biased(config: ModelConfig) -> Transformer:
    """Expert biases far from 0 where the family has some."""
    return small_model(config, bias=(-1.5, 1.0) if config.topk_method == "noaux_tc" else (0.0, 0.0))


def in_memory(model: Transformer) -> Read:
    """Reads the tensors of a model for an export."""
    state = model.state_dict()
    return lambda name, expert: state[name] if expert is None else state[name][expert]


def exported(model: Transformer, folder: Path, dtype: str = "float32", file_bytes: int = 20_000) -> Path:
    """Many small files, so that the index counts."""

    def write(at: Path) -> None:
        write_weights(model.config, in_memory(model), at, DTYPES[dtype], file_bytes)
        write_json(at / "config.json", to_json(model.config, {"eos_token_id": None}, dtype))

    write_folder(folder, write)
    return folder


def imported(folder: Path, config: ModelConfig | None = None) -> Transformer:
    """Every number is poisoned before, so that one that is not filled shows."""
    source = HubFolder(folder)
    model = Transformer(config or source.config)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan)
    source.load_into(model, fill)
    return model.eval()


__all__ = ["LLAMA", "V2", "V2_GROUPS", "V2_LITE", "biased", "exported", "imported", "small_config"]
