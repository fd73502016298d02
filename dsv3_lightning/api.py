"""The Python API, as `dsv3_lightning.load` and so on: load a model, build one, generate text.

`dsv3_lightning/__init__.py` imports this file when one of its names is first used, so that `import dsv3_lightning`
alone loads no torch.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.inference.decode import decode
from dsv3_lightning.inference.sampling import Sampling
from dsv3_lightning.inference.text import encode
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.runs import models
from dsv3_lightning.training.module import PretrainModule

__all__ = ["ModelConfig", "PretrainModule", "Sampling", "Tokenizer", "Transformer", "build_model", "generate", "load"]


def load(path: str | Path) -> tuple[Transformer, Tokenizer]:
    """A trained model, fp32 on the CPU in evaluation mode, and its tokenizer.

    path: a run's folder (its best checkpoint), one of its checkpoints, or a Hugging Face folder.
    Raises ConfigError where there is none, or it can't be read.
    """
    return models.load(str(path))


def build_model(config: ModelConfig, seed: int = 1, device: str | torch.device = "cpu") -> Transformer:
    """A new model with the initial weights of a run with that seed, fp32.

    `Transformer(config)` alone leaves its weights unwritten, since each rank of a run fills only its own part.
    """
    with torch.device(device):
        model = Transformer(config)
    model.init_weights(seed)
    return model


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    seed: int = 1,
) -> list[str]:
    """The continuation of each prompt, without the prompt. sampling: greedy where it isn't given.

    Each ends at an end token, after max_new_tokens, or when the context is full. Raises ConfigError for a prompt
    that leaves no room.
    """
    ids = [[tokenizer.bos_id, *encode(tokenizer, text)] for text in prompts]
    new = decode(model, ids, max_new_tokens, sampling or Sampling(), tokenizer.end_ids, seed)
    return [tokenizer.decode(tokens) for tokens in new]
