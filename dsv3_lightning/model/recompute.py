"""Activation checkpointing: what of a block is kept for the backward pass, and what is computed again."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

SAVED_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten.topk.default,  # the router's choices must not differ between the two passes
    torch.ops._c10d_functional.all_to_all_single.default,  # tokens reach their experts once
}


def no_checkpointing(module: Callable, *args: Any) -> Any:
    """Keeps every activation."""
    return module(*args)


def full_checkpointing(module: Callable, *args: Any) -> Any:
    """Keeps the block's inputs alone."""
    return checkpoint(module, *args, use_reentrant=False)


def selective_checkpointing(module: Callable, *args: Any) -> Any:
    """Keeps the results of SAVED_OPS; norms, activations and rotations are computed again."""
    return checkpoint(module, *args, use_reentrant=False, context_fn=selective_contexts)


def selective_contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The modes of the first pass, which saves, and of the second, which finds what was saved."""
    first, second = create_selective_checkpoint_contexts(lambda *_args, **_kwargs: CheckpointPolicy.MUST_SAVE)
    return OnSavedOps(first), OnSavedOps(second)


def keep_no_more() -> None:
    """Tells selective checkpointing that the backward pass needs no result of what the block computes from here on.

    The recomputation then ends here: torch stops it at the last tensor that is needed.
    """
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, OnSavedOps):
            mode.keeps = False


class OnSavedOps(TorchDispatchMode):
    """Another mode, applied to SAVED_OPS alone, up to `keep_no_more`.

    torch's mode counts the operations it sees, and the two passes have unequal numbers of others where parameters are
    gathered on the way.
    """

    def __init__(self, mode: TorchDispatchMode) -> None:
        super().__init__()
        self.mode = mode
        self.keeps = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.keeps and func in SAVED_OPS:
            return self.mode.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


RECOMPUTE = {"none": no_checkpointing, "selective": selective_checkpointing, "full": full_checkpointing}
