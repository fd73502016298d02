"""The optimizer of a run: AdamW as in V3 §4.2, or Muon for matrices as in arXiv 2502.16982; only matrices decay."""

from typing import Any

import torch
from torch import Tensor, nn

from dsv3_lightning.model.experts import Experts
from dsv3_lightning.model.router import Router
from dsv3_lightning.parallel.tensors import local
from dsv3_lightning.training.adamw import MasterAdamW
from dsv3_lightning.training.config import OptimizerConfig
from dsv3_lightning.training.muon import Muon, newton_schulz_dtype

MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_optimizer(module: nn.Module, config: OptimizerConfig, precision: str = "32-true") -> torch.optim.Optimizer:
    """The optimizer of a model, which may be sharded. Its groups: matrices, with weight decay, and norms, without.

    With Muon its matrices are a group of their own, before those of AdamW. Shared parameters appear once.
    precision: Lightning's name of the run's.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.dim() >= 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    settings: dict[str, Any] = {"fused": True, "lr": config.lr, "betas": config.betas, "eps": config.eps}
    moments = MOMENTS[config.moments]
    if config.kind == "muon":
        others = adamw_matrices(module)
        by_kind = [[p for p in matrices if p not in others], [p for p in matrices if p in others]]
        first = [{"params": params, "weight_decay": config.weight_decay} for params in by_kind]
        joined = {child.gate_up_proj for child in module.modules() if isinstance(child, Experts)}
        return Muon([*first, groups[-1]], joined, newton_schulz_dtype(precision), moments, **settings)
    if config.moments == "fp32" and all(p.dtype == torch.float32 and local(p) is p for p in parameters):
        return torch.optim.AdamW(groups, **settings)
    return MasterAdamW(groups, moments, **settings)


def adamw_matrices(module: nn.Module) -> set[Tensor]:
    """The matrices that Muon leaves to AdamW: embedding, output head and routers (arXiv 2502.16982 §2.2)."""
    heads = [getattr(module, name).weight for name in ("embed_tokens", "lm_head") if hasattr(module, name)]
    return {*heads, *(child.weight for child in module.modules() if isinstance(child, Router))}
