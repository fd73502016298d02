"""Verification of exports: logits of the training model, compared with those of the model read back."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsv3_lightning.common.files import make_folder, remove
from dsv3_lightning.common.numbers import read_numbers, write_numbers
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.mtp import MTPModule
from dsv3_lightning.model.rope import cos_sin
from dsv3_lightning.model.transformer import Transformer

TOLERANCE = 1e-4


@torch.no_grad()
def all_logits(model: Transformer, tokens_BT: Tensor) -> tuple[Tensor, Tensor | None]:
    """fp32 logits [B, T, V], row i for token i + 1, and those of MTP module 1, [B, T - 1, V], for token i + 2."""
    h_BTD, _ = model.trunk(model.embed_tokens(tokens_BT), torch.ones_like(tokens_BT, dtype=torch.bool))
    logits_BTV = model.lm_head(h_BTD)
    if not len(model.mtp) or tokens_BT.shape[1] < 2:
        return logits_BTV, None
    module, after = model.mtp[0], tokens_BT[:, 1:]
    assert isinstance(module, MTPModule)
    at = cos_sin(model.config, torch.arange(after.shape[1]))
    h_BTD, _ = module(h_BTD[:, :-1], model.embed_tokens(after), at, torch.ones_like(after, dtype=torch.bool))
    return logits_BTV, model.lm_head(module.norm(h_BTD))


def verification_tokens(path: Path | None, config: ModelConfig) -> Tensor:
    """Tokens, int64 [B, T], from an .npy file, or two samples of 64 random ones. Raises ConfigError."""
    if path is None:
        length = min(64, config.max_position_embeddings)
        return torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    array = read_numbers("--verify", path)
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or not array.size or not np.issubdtype(array.dtype, np.integer):
        raise ConfigError(f"--verify {path}: must hold whole numbers [B, T], holds {array.dtype} {list(array.shape)}")
    if array.min() < 0 or array.max() >= config.vocab_size:
        raise ConfigError(f"--verify {path}: a token lies outside 0 to {config.vocab_size - 1}")
    if array.shape[1] > config.max_position_embeddings:
        raise ConfigError(
            f"--verify {path}: {array.shape[1]} tokens; the context holds {config.max_position_embeddings}"
        )
    return torch.from_numpy(array.astype(np.int64))


def write_logits(folder: Path, tokens_BT: Tensor, logits: tuple[Tensor, Tensor | None]) -> None:
    """Writes tokens.npy, logits.npy and, with MTP, mtp_logits.npy. Raises ConfigError if `folder` can't be made."""
    make_folder("--verify", folder)
    remove(folder / "mtp_logits.npy")
    for name, tensor in zip(("tokens", "logits", "mtp_logits"), (tokens_BT, *logits)):
        if tensor is not None:
            write_numbers(folder / f"{name}.npy", tensor.numpy())


def largest_difference(ours: tuple[Tensor, Tensor | None], theirs: tuple[Tensor, Tensor | None]) -> float:
    """The largest absolute difference over the logits of all heads; NaN if one of them is NaN."""
    pairs = [(a, b) for a, b in zip(ours, theirs) if a is not None and b is not None]
    return torch.stack([(a - b).abs().max() for a, b in pairs]).max().item()
