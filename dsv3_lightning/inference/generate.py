"""Generation without a cache, which runs the full context for each new token; works with sharded models."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from dsv3_lightning.inference.decoder import check_lengths, without
from dsv3_lightning.inference.sampling import Sampling, random_stream
from dsv3_lightning.model.config import ModelConfig


class Model(Protocol):
    """A Transformer, or another that is called as one: with tokens [B, T] and positions [B], for logits [B, V]."""

    config: ModelConfig

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def __call__(self, tokens_BT: Tensor, positions_B: Tensor, /) -> Tensor: ...


@torch.no_grad()
def generate(
    model: Model,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    eos_id: int,
    seed: int,
    unused: Sequence[int] = (),
    numbers: Sequence[int] | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt (of at least one id), up to the context limit or the end token, which is left out.

    Each prompt has its own random stream, from the seed and the prompt's number. Shorter prompts are padded on the
    right, which causal attention doesn't see.
    unused: ids that no token has, which are never drawn. numbers: the prompts' numbers; by default from 0 on.
    Raises ConfigError for an impossible argument or a prompt that fills the context.
    """
    limit = model.config.max_position_embeddings
    check_lengths([len(p) for p in prompts], max_new_tokens, limit)
    generators = [random_stream(seed, number) for number in (range(len(prompts)) if numbers is None else numbers)]
    device = next(model.parameters()).device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    start = lengths.tolist()
    tokens_BT = torch.full((len(prompts), min(max(start) + max_new_tokens, limit)), eos_id, device=device)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt, device=device)
    running = torch.ones(len(prompts), dtype=torch.bool, device=device)
    rows = torch.arange(len(prompts), device=device)
    unused_N = torch.tensor(unused, dtype=torch.int64, device=device)
    for _ in range(max_new_tokens):
        context = tokens_BT[:, : int(lengths.max())]
        logits_BV = model(context, lengths - 1).float()  # called as a module, so sharded weights are gathered
        chosen = torch.tensor(sampling.pick(without(logits_BV, unused_N), generators), device=device)
        running = running & (chosen != eos_id) & (lengths < limit)
        if not running.any():
            break
        at = rows[running]
        tokens_BT[at, lengths[at]] = chosen[at]
        lengths[at] += 1
    return [row[begin:end].tolist() for row, begin, end in zip(tokens_BT, start, lengths.tolist(), strict=True)]
