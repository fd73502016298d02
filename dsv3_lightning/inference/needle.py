"""Needle-in-a-haystack test: retrieval of one line at various depths of a long text.

The text is filler with "the secret number is …" at some depth, and ends with the same words; the model has to predict
the digits after them. Small models rarely succeed, so next to the share of digits that greedy decoding gets right, the
result has the gain in nats per token against the same text with another number.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.inference.decoder import Decoder
from dsv3_lightning.model.transformer import Transformer

ASK = "\n# The secret number is "


class Found(NamedTuple):
    """Results, fp64 [lengths, depths]. right: share of digit tokens greedy decoding finds. saved: nats per token."""

    right: Tensor
    saved: Tensor


def find_needles(
    model: Transformer, tokenizer: Tokenizer, filler: list[int], lengths: list[int], depths: list[float], texts: int
) -> Found:
    """Means over `texts` numbers and filler texts. depths: from 0, the beginning, to 1, the end. Raises ConfigError."""
    ask, full_stop = tokenizer.encode(ASK), tokenizer.encode(".\n")
    unused = tokenizer.ids_without_text(model.config.vocab_size)
    numbers = [[tokenizer.encode(f"{secret(text, which)}") for which in (0, 1)] for text in range(texts)]
    for length in lengths:
        for number, other in numbers:
            around = 1 + 2 * len(ask) + len(number) + len(full_stop)
            least, most = around + max(len(number), len(other)), around + min(len(number), len(other)) + len(filler)
            if not least <= length <= most:
                raise ConfigError(
                    f"--lengths {length}: must be from {least} to {most}; the validation text has {len(filler)} tokens"
                )
    right, saved = torch.zeros(2, len(lengths), len(depths), dtype=torch.float64).unbind()
    for row, length in enumerate(lengths):
        for column, depth in enumerate(depths):
            for text, (number, other) in enumerate(numbers):
                scores = []
                for needle in (number, other):
                    line, tail = [*ask, *needle, *full_stop], [*ask, *number]
                    room = length - 1 - len(line) - len(tail)
                    start = text * 997 % (len(filler) - room + 1)
                    hay, place = filler[start : start + room], round(depth * room)
                    ids = [tokenizer.bos_id, *hay[:place], *line, *hay[place:], *tail]
                    scores.append(score(model, ids, len(number), unused))
                right[row, column] += scores[0][0] / texts
                saved[row, column] += (scores[0][1] - scores[1][1]) / texts
    return Found(right, saved)


def secret(text: int, which: int) -> int:
    """A number of six digits; the two numbers of a text differ in every digit."""
    digits = f"{(text + 1) * 716_537 % 1_000_000:06}"
    return int("".join(str((int(digit) + 5 * which) % 10) for digit in f"1{digits[1:]}"))


def score(model: Transformer, ids: list[int], answer: int, unused: Sequence[int] = ()) -> tuple[float, float]:
    """The share of the last `answer` tokens that is most likely, and their mean log-probability.

    unused: ids that no token has, which get no probability.
    """
    decoder = Decoder(model, 1, len(ids), unused=unused)
    h_1TD = decoder.extend(torch.tensor([ids], device=decoder.device))
    logits_NV = decoder.logits(h_1TD[:, -answer - 1 : -1])[0]
    wanted_N = torch.tensor(ids[-answer:], device=decoder.device)
    right = (logits_NV.argmax(-1) == wanted_N).double().mean()
    likely_N = logits_NV.log_softmax(-1).gather(1, wanted_N[:, None])
    return float(right), float(likely_N.double().mean())
