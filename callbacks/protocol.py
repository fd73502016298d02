"""What the callbacks need of a LightningModule and its data. What is missing is one line, before the first step.

docs/python.md has the list. The checks run in `on_fit_start`, since a module may be built in its own `setup` or
`configure_model`, which Lightning calls after the callbacks' `setup`.
"""

import inspect
import math
from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.parallel.data_ranks import pipeline_of
from dsv3_lightning.training.logging import planned_steps

MISSING = object()


class Balanced(Protocol):
    """A router with a bias per expert, fp32 [E]."""

    expert_bias: Tensor


def name_of(value: object) -> str:
    return type(value).__name__


def lookup(module: object, path: str, default: Any = None) -> Any:
    """The attribute at a dotted path, or the default where any part of it is missing.

    >>> lookup(1j, "real.imag"), lookup(1j, "real.name.first", "none")
    (0.0, 'none')
    """
    for name in path.split("."):
        module = getattr(module, name, MISSING)
        if module is MISSING:
            return default
    return module


def require(pl_module: LightningModule, callback: Callback, *paths: str) -> None:
    """Raises ConfigError for the first of these attributes that the module lacks."""
    for path in paths:
        if lookup(pl_module, path, MISSING) is MISSING:
            raise ConfigError(f"{name_of(callback)} needs the attribute `{path}`, which {name_of(pl_module)} lacks")


def require_model(pl_module: LightningModule, callback: Callback) -> None:
    """Raises ConfigError where the module's `model` isn't one of ours."""
    require(pl_module, callback, "model")
    if not isinstance(pl_module.model, Transformer):
        raise ConfigError(
            f"{name_of(callback)} needs the attribute `model` to be a dsv3_lightning.Transformer; "
            f"in {name_of(pl_module)} it is a {name_of(pl_module.model)}"
        )


def require_data(trainer: Trainer, callback: Callback, *names: str) -> None:
    """Raises ConfigError for the first attribute that the data module lacks. Computes no property."""
    data = getattr(trainer, "datamodule", None)
    for name in names:
        if data is None or inspect.getattr_static(data, name, MISSING) is MISSING:
            lacking = f"which {name_of(data)} lacks" if data is not None else "but the Trainer has no data module"
            raise ConfigError(f"{name_of(callback)} needs the attribute `{name}` of the LightningDataModule, {lacking}")


def require_unit(trainer: Trainer, callback: Callback, by: str) -> None:
    """Raises ConfigError where a schedule can't count by this unit. Looks at the training data: on_train_start."""
    if by == "tokens":
        require_data(trainer, callback, "tokens_before")
    if by == "share" and math.isinf(planned_steps(trainer)):
        raise ConfigError(
            f"{name_of(callback)} has a schedule by=share, but the length of training is unknown; "
            "set max_steps of the Trainer, or by=steps"
        )


def routers_of(module: nn.Module) -> Iterator[Balanced]:
    """The modules that have a tensor `expert_bias`, in the model's order."""
    for child in module.modules():
        if isinstance(getattr(child, "expert_bias", None), Tensor):
            yield cast(Balanced, child)


def own_rows(trainer: Trainer) -> list[int] | None:
    """The rows of `expert_counts` that are about this rank's routers; None: all, there is no pipeline."""
    pipeline = pipeline_of(trainer.strategy)
    return None if pipeline is None else pipeline.rows


def all_biases(trainer: Trainer, pl_module: nn.Module) -> Tensor:
    """The bias of every router, fp32 [L, E], those of a pipeline's other ranks included; every rank must call it."""
    own, pipeline = [router.expert_bias for router in routers_of(pl_module)], pipeline_of(trainer.strategy)
    return torch.stack(own) if pipeline is None else pipeline.gather_rows(own)


def require_routers(trainer: Trainer, pl_module: LightningModule, callback: Callback) -> None:
    """Raises ConfigError unless there is a router, and every router's bias is fp32."""
    routers = list(routers_of(pl_module))
    if not routers and not lookup(pl_module, "model.config.num_moe_layers"):  # other ranks of a pipeline may have them
        raise ConfigError(
            f"{name_of(callback)} needs modules with a buffer `expert_bias`, and {name_of(pl_module)} has none"
        )
    for router in routers:
        if router.expert_bias.dtype != torch.float32:  # in bf16 a step of 0.001 is lost at a bias of 0.5
            raise ConfigError(
                f"{name_of(callback)} needs `expert_bias` to be torch.float32; "
                f"in {name_of(router)} of {name_of(pl_module)} it is {router.expert_bias.dtype}"
            )


def output(outputs: Any, key: str, callback: Callback, pl_module: nn.Module) -> Any:
    """outputs[key] of a training step. Raises ConfigError."""
    if not isinstance(outputs, dict) or key not in outputs:
        found = ", ".join(map(str, outputs)) if isinstance(outputs, dict) else ""
        raise ConfigError(
            f"{name_of(callback)} needs the key `{key}` in what training_step of {name_of(pl_module)} returns; "
            f"found: {found or 'none'}"
        )
    return outputs[key]


def expert_counts(outputs: Any, callback: Callback, pl_module: nn.Module) -> Tensor:
    """outputs["expert_counts"] of a training step, int64 [L, E]. Raises ConfigError."""
    counts_LE: Tensor = output(outputs, "expert_counts", callback, pl_module)
    if counts_LE.dim() != 2 or counts_LE.is_floating_point():
        raise ConfigError(
            f"{name_of(callback)} needs `expert_counts` of {name_of(pl_module)} to be integers [layers, experts]; "
            f"found: {counts_LE.dtype} {list(counts_LE.shape)}"
        )
    return counts_LE


def from_batch(batch: Any, key: str, callback: Callback) -> Any:
    """batch[key] of a validation batch. Raises ConfigError."""
    if not isinstance(batch, dict) or key not in batch:
        raise ConfigError(f"{name_of(callback)} needs the key `{key}` in validation batches, which are dicts")
    return batch[key]
