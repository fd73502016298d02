"""The stored settings of a run's folder, readable by later versions."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dsv3_lightning.callbacks.settings import CALLBACKS
from dsv3_lightning.config.compose import read_yaml, resolve

# Values that reproduce the behavior before a setting existed. Every setting added to the schema or to a callback gets a
# line here, whatever its default, so that runs started without it continue unchanged. A callback itself needs none: one
# that stored settings lack is off.
OFF: dict[str, Any] = {
    "init_from": None,
    "dpo": None,
    "grpo": None,
    "data.sources": None,
    "data.cleaning": None,
    "data.skip_bad_lines": False,
    "data.tokenizer": None,
    "data.end_token": None,
    "data.packing": "best_fit",
    "data.weights_schedule": None,
    "data.pretokenization": "v3",
    "data.tokenizer_bytes": 1 << 27,
    "data.tokenizer_weights": None,
    "data.fim_rate": 0.0,
    "data.split_rate": 0.0,
    "data.shard_bytes": 1 << 28,
    "data.max_document_bytes": 1 << 30,
    "data.batch_ramp": None,
    "data.mask_document_ends": False,
    "data.isolate_documents": False,
    "data.num_workers": 0,
    "optimizer.kind": "adamw",
    "optimizer.moments": "fp32",
    "loss.mtp_weight": None,
    "compute.activation_checkpointing": "none",
    "compute.fp8": False,
    "compute.compile": False,
    "compute.compile_cache": "runs/compiled",
    "trainer.num_nodes": 1,
    "trainer.accumulate_grad_batches": 1,
    "trainer.gradient_clip_val": None,
    "strategy": "auto",
    "callbacks.expert_bias.by": "share",
    "callbacks.expert_bias.rule": "sign",
    "callbacks.expert_bias.centered": False,
    "callbacks.balance_factor.by": "share",
    "callbacks.mtp_weight.by": "share",
    "callbacks.router_monitor.per_layer": False,
    "callbacks.throughput.peak_flops": None,
    "callbacks.checkpoint.every_n_minutes": None,
    "callbacks.checkpoint.best_by": "val/loss",
    "callbacks.checkpoint.best_is": "lowest",
    "callbacks.evaluate": None,
    "callbacks.throughput.straggler": 1.5,
    "callbacks.loss_spike": None,
    "callbacks.garbage_collection": None,
    "callbacks.pipeline_trace": None,
    "callbacks.memory_snapshot": {"history": 0},  # it changes nothing in a run that has enough memory
}


def read_stored(path: Path) -> dict[str, Any]:
    """The tree of a run's config.yaml, with missing settings filled from OFF. Raises ConfigError."""
    return complete(resolve(OmegaConf.create(read_yaml(path))))


def complete(tree: dict[str, Any]) -> dict[str, Any]:
    """A tree with missing settings filled from OFF, and missing callbacks switched off.

    Arguments are added only to callbacks that are on.

    >>> complete({"data": {"num_workers": 2}, "callbacks": {"mtp_weight": None}})["data"]["isolate_documents"]
    False
    """
    for key, value in OFF.items():
        *sections, name = key.split(".")
        node: Any = tree
        for depth, section in enumerate(sections):
            node = node.setdefault(section, {}) if depth == 0 else node.get(section)
            if not isinstance(node, dict):
                break
        else:
            node.setdefault(name, value)
    callbacks = tree.setdefault("callbacks", {})
    for name in CALLBACKS:
        callbacks.setdefault(name, None)
    return tree
