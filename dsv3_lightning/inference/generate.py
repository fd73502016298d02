"""Continues prompts by running the whole context through the model for each new token."""

import torch
from torch import Tensor

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.model.transformer import Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    eos_id: int,
    seed: int,
) -> list[list[int]]:
    """The new tokens of each prompt (ids, at least one each), up to and without the end token or the context limit.

    temperature 0 is greedy. Prompts of different lengths are padded on the right, which a causal model doesn't see.
    Raises ConfigError for an impossible argument or a prompt that fills the context.
    """
    limit = model.config.max_position_embeddings
    check_arguments([len(p) for p in prompts], max_new_tokens, temperature, limit)
    device = model.embed_tokens.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    start = lengths.tolist()
    tokens_BT = torch.full((len(prompts), min(max(start) + max_new_tokens, limit)), eos_id, device=device)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt, device=device)
    running = torch.ones(len(prompts), dtype=torch.bool, device=device)
    rows = torch.arange(len(prompts), device=device)
    for _ in range(max_new_tokens):
        context = tokens_BT[:, : int(lengths.max())]
        logits_BV = model(context, lengths - 1).float()  # as a call, which gathers weights that are sharded
        chosen = pick(logits_BV, temperature, generator)
        running = running & (chosen != eos_id) & (lengths < limit)
        if not running.any():
            break
        at = rows[running]
        tokens_BT[at, lengths[at]] = chosen[at]
        lengths[at] += 1
    return [row[begin:end].tolist() for row, begin, end in zip(tokens_BT, start, lengths.tolist(), strict=True)]


def pick(logits_BV: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One token per row: the likeliest at temperature 0, else drawn from softmax(logits / temperature)."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    # Shifted first, so that a tiny temperature can't overflow.
    scaled = (logits_BV.double() - logits_BV.max(-1, keepdim=True).values) / temperature
    return torch.multinomial(scaled.softmax(-1), 1, generator=generator).squeeze(1)


def check_arguments(lengths: list[int], max_new_tokens: int, temperature: float, limit: int) -> None:
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens={max_new_tokens}: must be at least 0")
    if not temperature >= 0:
        raise ConfigError(f"temperature={temperature}: must be at least 0 (0 is greedy)")
    if min(lengths) < 1:
        raise ConfigError("a prompt holds no token; start it with the begin token")
    if max(lengths) > limit:
        raise ConfigError(f"a prompt of {max(lengths)} tokens is longer than the context of {limit} tokens")
