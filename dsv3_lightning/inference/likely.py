"""Log-probabilities of the tokens of a text as it is decoded, and the most likely tokens at each place."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.inference.decoder import Decoder, without
from dsv3_lightning.inference.text import TextStream
from dsv3_lightning.model.scores import some_rows


class TokenScore(NamedTuple):
    """A token of a text. log_p: its natural log-probability, None for the first token of a prompt, before which there
    is nothing. top: the most likely tokens there with theirs, in falling order. offset: characters before it."""

    token: int
    log_p: float | None
    top: list[tuple[int, float]]
    offset: int


def token_scores(
    logits_NV: Tensor, tokens: Sequence[int], offsets: Sequence[int], top: int, unused: Tensor
) -> list[TokenScore]:
    """Scores of N tokens from the logits before each, fp32. Probabilities are those of the whole head, as in the
    training loss; unused ids (int64 [n]) are not among the `top` most likely ones."""
    log_p_NV = logits_NV.log_softmax(-1)
    log_p_N = log_p_NV.gather(1, torch.tensor(tokens, device=log_p_NV.device)[:, None]).squeeze(1).tolist()
    best = without(log_p_NV, unused).topk(min(top, log_p_NV.shape[1] - len(unused)))
    ranked = [list(zip(*row)) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return [TokenScore(*one) for one in zip(tokens, log_p_N, ranked, offsets, strict=True)]


def prompt_scores(decoder: Decoder, h_TD: Tensor, prompt: list[int], offsets: list[int], top: int) -> list[TokenScore]:
    """Scores of a prompt's T tokens from its hidden states; logits exist for a part of them at a time."""
    scores, start = [TokenScore(prompt[0], None, [], offsets[0])], 1
    for some_ND in some_rows(h_TD[:-1], decoder.config.vocab_size):
        here = slice(start, start + len(some_ND))
        scores += token_scores(decoder.head(some_ND), prompt[here], offsets[here], top, decoder.unused)
        start = here.stop
    return scores


def text_of(tokenizer: Tokenizer, ids: Sequence[int], silent: int) -> tuple[str, list[int]]:
    """The text of the ids, and the characters before each. The first `silent` ids are not part of the text."""
    stream, pieces, offsets = TextStream(tokenizer), [], [0] * silent
    for token in ids[silent:]:
        pieces.append(stream.push(token))
        offsets.append(stream.start)
    return "".join([*pieces, stream.finish()]), offsets
