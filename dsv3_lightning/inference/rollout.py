"""Answers to prompts for reinforcement learning: one pass over each prompt, shared by all of its samples.

Each sample has random numbers of its own, from (seed, step, prompt, sample), so that it doesn't depend on what else is
in the batch, and a run that was killed samples the same again. Sampled is the full distribution at a temperature, with
no top-k, top-p or excluded ids: what the loss computes with.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsv3_lightning.inference.decoder import Decoder, check_lengths
from dsv3_lightning.inference.layers import Mixture
from dsv3_lightning.model.transformer import Transformer

ROWS = 512  # samples that are decoded together


class Sampled(NamedTuple):
    """The answers of one prompt. tokens: of each sample, with the end token if it ended. ended: whether it did.

    log_p: the log-probability that each token was drawn with, at the temperature of sampling.
    routes: experts of each sample's tokens but the last, prompt included, int16 [tokens - 1, L, K]; None if unasked.
    """

    tokens: list[list[int]]
    ended: list[bool]
    log_p: list[list[float]]
    routes: list[np.ndarray] | None


class Key(NamedTuple):
    """What the random numbers of a prompt's samples follow from."""

    seed: int
    step: int
    prompt: int


def uniforms(key: Key, samples: int, length: int) -> Tensor:
    """The random numbers of each sample's tokens, fp64 [samples, length] in [0, 1)."""
    streams = [
        np.random.default_rng(np.random.SeedSequence(key.seed, spawn_key=(key.step, key.prompt, sample)))
        for sample in range(samples)
    ]
    return torch.from_numpy(np.stack([stream.random(length) for stream in streams]))


def inverse_cdf(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The token whose interval of the cumulative distribution holds the number, int64 [B], and its log-probability,
    fp64 [B]. Temperature 0 is greedy: all of the probability is on one token."""
    if temperature == 0:
        return logits_BV.argmax(1), torch.zeros(len(logits_BV), dtype=torch.float64)
    p_BV = (logits_BV.double() / temperature).softmax(1)
    cumulative_BV = p_BV.cumsum(1)
    drawn_B1 = uniform_B[:, None].to(cumulative_BV.device) * cumulative_BV[:, -1:]
    token_B1 = torch.searchsorted(cumulative_BV, drawn_B1, right=True).clamp(max=logits_BV.shape[1] - 1)
    return token_B1.squeeze(1), p_BV.gather(1, token_B1).squeeze(1).log()


@torch.inference_mode()
def sample_answers(
    model: Transformer, prompts: Sequence[Sequence[int]], keys: Sequence[Key], samples: int, max_new_tokens: int,
    temperature: float, end_ids: set[int], routed: int = 0,
) -> list[Sampled]:  # fmt: skip
    """`samples` answers to each prompt, of up to max_new_tokens tokens or to an end token. Raises ConfigError.

    The model's weights are whole on one device. routed: for how many of the first prompts the chosen experts are
    returned, too.
    """
    check_lengths([len(prompt) for prompt in prompts], max_new_tokens, model.config.max_position_embeddings)
    together = max(1, ROWS // samples)
    found: list[Sampled] = []
    for first in range(0, len(prompts), together):
        some = slice(first, first + together)
        asked = max(0, min(routed - first, together))
        found += Batch(model, prompts[some], keys[some], samples, max_new_tokens, temperature, end_ids, asked).run()
    return found


class Batch:
    """Prompts whose samples are decoded together. Rows of the decoder are samples that haven't ended."""

    def __init__(
        self, model: Transformer, prompts: Sequence[Sequence[int]], keys: Sequence[Key], samples: int, limit: int,
        temperature: float, end_ids: set[int], routed: int,
    ) -> None:  # fmt: skip
        self.prompts, self.samples, self.limit = prompts, samples, limit
        self.temperature, self.end_ids = temperature, end_ids
        total = len(prompts) * samples
        capacity = max(map(len, prompts)) + limit - 1  # the last token is never an input
        self.decoder = Decoder(model, total, capacity, lower="data.batch_size, grpo.group_size or grpo.max_new_tokens")
        self.uniform_BT = torch.cat([uniforms(key, samples, limit) for key in keys])
        self.tokens: list[list[int]] = [[] for _ in range(total)]
        self.log_p: list[list[float]] = [[] for _ in range(total)]
        self.ended = [False] * total
        self.routed = routed * samples  # the first samples, whose experts are kept
        self.mixtures = [layer.mlp for layer in self.decoder.layers if isinstance(layer.mlp, Mixture)] if routed else []
        self.routes: list[list[Tensor]] = [[] for _ in range(total)]
        for mixture in self.mixtures:
            mixture.chosen = []

    def run(self) -> list[Sampled]:
        rows: list[int] = []
        for number, prompt in enumerate(self.prompts):  # a row for each sample, with a copy of the prompt's cache
            row = len(rows)
            self.decoder.lengths[row] = 0
            h_1TD = self.decoder.extend(torch.tensor([list(prompt)], device=self.decoder.device), row)
            for other in range(row + 1, row + self.samples):
                self.decoder.move(row, other)
            own = list(range(number * self.samples, (number + 1) * self.samples))
            if self.mixtures:
                chosen = self.taken()[0]
                for sample in own:
                    if sample < self.routed:
                        self.routes[sample].append(chosen)
            logits_1V = self.decoder.logits(h_1TD[:, -1:])[:, -1]
            rows = self.take([*rows, *own], own, logits_1V.expand(self.samples, -1))
        while rows:
            last = torch.tensor([[self.tokens[sample][-1]] for sample in rows], device=self.decoder.device)
            h_B1D = self.decoder.extend(last)
            if self.mixtures:
                kept = [row for row, sample in enumerate(rows) if sample < self.routed]
                for row, chosen in zip(kept, self.taken()[kept], strict=True):
                    self.routes[rows[row]].append(chosen)
            rows = self.take(rows, rows, self.decoder.logits(h_B1D)[:, -1])
        return [self.of_prompt(number) for number in range(len(self.prompts))]

    def take(self, rows: list[int], fresh: list[int], logits_BV: Tensor) -> list[int]:
        """Appends a token to the samples `fresh`, the last of the rows; returns the rows without those that ended."""
        places = [len(self.tokens[sample]) for sample in fresh]
        new_B, log_p_B = inverse_cdf(logits_BV, self.uniform_BT[fresh, places], self.temperature)
        rows = list(rows)
        for sample, token, log_p in zip(fresh, new_B.tolist(), log_p_B.tolist(), strict=True):
            self.tokens[sample].append(token)
            self.log_p[sample].append(log_p)
            self.ended[sample] = token in self.end_ids
        for row in reversed(range(len(rows))):
            sample = rows[row]
            if self.ended[sample] or len(self.tokens[sample]) == self.limit:
                self.decoder.move(len(rows) - 1, row)
                rows[row] = rows[-1]
                rows.pop()
        return rows

    def taken(self) -> Tensor:
        """The experts of the tokens of the last pass, [B, T, L, K]; int16."""
        layers = [mixture.chosen.pop() for mixture in self.mixtures if mixture.chosen is not None]
        return torch.stack(layers, 2).to("cpu", torch.int16)

    def of_prompt(self, number: int) -> Sampled:
        own = slice(number * self.samples, (number + 1) * self.samples)
        kept = own.start < self.routed and bool(self.mixtures)
        routes = [torch.cat(parts).numpy() for parts in self.routes[own]] if kept else None
        return Sampled(self.tokens[own], self.ended[own], self.log_p[own], routes)
