"""Activation checkpointing: what of a block is kept for the backward pass, and what is computed again."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.attention.varlen  # registers its operation
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# Operations that decide between discrete outcomes. Products on a GPU may round otherwise in the second pass, and then a
# near-tie would send tokens to other experts than in the first: wrong gradients, and with expert parallelism ranks that
# wait for rows that never come. A router's choices take some bytes per token.
CHOICES = {torch.ops.aten.topk.default}
SAVED_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten._grouped_mm.default,
    *([torch.ops.aten._scaled_mm_v2.default] if hasattr(torch.ops.aten, "_scaled_mm_v2") else ()),  # FP8
    torch.ops.aten.baddbmm.default,  # attention of short sequences on a CPU
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops._c10d_functional.all_to_all_single.default,  # tokens reach their experts once
    torch.ops.torch_attn._varlen_attn.default,
    *CHOICES,
}


def no_checkpointing(module: Callable, *args: Any) -> Any:
    """Keeps every activation."""
    return module(*args)


def full_checkpointing(module: Callable, *args: Any) -> Any:
    """Keeps the block's inputs and the router's CHOICES."""
    return recomputed(module, args, CHOICES)


def selective_checkpointing(module: Callable, *args: Any) -> Any:
    """Keeps the results of SAVED_OPS; norms, activations and rotations are computed again."""
    return recomputed(module, args, SAVED_OPS)


def recomputed(module: Callable, args: tuple[Any, ...], saved: set[Any]) -> Any:
    """The module's result; of what it computes only the results of the operations in `saved` are kept.

    The state of the random generators is not: the model draws no random numbers.
    """
    contexts = partial(saving_contexts, saved)
    return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def saving_contexts(saved: set[Any]) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The modes of the first pass, which saves, and of the second, which finds what was saved."""
    first, second = create_selective_checkpoint_contexts(lambda *_args, **_kwargs: CheckpointPolicy.MUST_SAVE)
    return OnSavedOps(first, saved), OnSavedOps(second, saved)


def keep_no_more() -> None:
    """Tells selective checkpointing that the backward pass needs no result of what the block computes from here on.

    The recomputation then ends here: torch stops it at the last tensor that is needed.
    """
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, OnSavedOps):
            mode.saved = set()


class OnSavedOps(TorchDispatchMode):
    """Another mode, applied to the operations in `saved` alone, up to `keep_no_more`.

    torch's mode counts the operations it sees, and the two passes have unequal numbers of others where parameters are
    gathered on the way.
    """

    def __init__(self, mode: TorchDispatchMode, saved: set[Any]) -> None:
        super().__init__()
        self.mode, self.saved = mode, saved

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.saved:
            return self.mode.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


RECOMPUTE = {"none": no_checkpointing, "selective": selective_checkpointing, "full": full_checkpointing}
