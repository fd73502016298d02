"""Batched decoding of prompts of different lengths, one token each per step; ended rows leave the batch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsv3_lightning.inference.decoder import Decoder, check_lengths
from dsv3_lightning.inference.sampling import Sampling, random_stream
from dsv3_lightning.model.transformer import Transformer

Stop = Callable[[int, int], bool]


def decode(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    end_ids: set[int],
    seed: int,
    on_token: Stop | None = None,
    unused: Sequence[int] = (),
    numbers: Sequence[int] | None = None,
    weights: str = "fp32",
) -> list[list[int]]:
    """The new tokens of each prompt, up to the context limit or an end token, which is left out. Raises ConfigError.

    Each prompt has its own random stream, from the seed and the prompt's number, so its text doesn't depend on the
    other prompts, and two equal prompts have different texts.
    on_token(prompt's number, token): called for every new token; True ends that text, with this token.
    unused: ids that no token has, which are never drawn. numbers: the prompts' numbers; by default from 0 on.
    weights: see `Decoder`.
    """
    limit = model.config.max_position_embeddings
    check_lengths([len(prompt) for prompt in prompts], max_new_tokens, limit)
    if not max_new_tokens:
        return [[] for _ in prompts]
    capacity = min(max(len(prompt) for prompt in prompts) + max_new_tokens, limit)
    decoder = Decoder(model, len(prompts), capacity, unused=unused, weights=weights)
    generators = [random_stream(seed, number) for number in (range(len(prompts)) if numbers is None else numbers)]
    new: list[list[int]] = [[] for _ in prompts]
    running: list[int] = []  # the prompt of each row

    def take(token: int, number: int) -> bool:
        """True if the text continues after this token."""
        if token in end_ids or len(prompts[number]) + len(new[number]) >= limit:
            return False
        new[number].append(token)
        ended = on_token is not None and on_token(number, token)
        room = len(new[number]) < max_new_tokens and len(prompts[number]) + len(new[number]) < limit
        return room and not ended

    for number, prompt in enumerate(prompts):
        row = len(running)
        decoder.lengths[row] = 0
        h_D = decoder.extend(torch.tensor([prompt], device=decoder.device), row)[:, -1:]
        (token,) = pick(decoder, h_D, sampling, [generators[number]])
        if take(token, number):
            running.append(number)
    while running:
        last = torch.tensor([[new[number][-1]] for number in running], device=decoder.device)
        tokens = pick(decoder, decoder.extend(last), sampling, [generators[number] for number in running])
        for row in reversed(range(len(running))):
            if not take(tokens[row], running[row]):
                decoder.move(len(running) - 1, row)
                running[row] = running[-1]
                running.pop()
    return new


def pick(decoder: Decoder, h_B1D: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> list[int]:
    return sampling.pick(decoder.logits(h_B1D)[:, -1], generators)
