"""Ways to generate the texts of requests: with a cache, or by calling a sharded model."""

import functools
from collections.abc import Callable, Sequence

from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.evaluation.generation import Generated, Request, Write
from dsv3_lightning.inference.decode import decode
from dsv3_lightning.inference.generate import Model, generate
from dsv3_lightning.inference.text import TextStream
from dsv3_lightning.model.transformer import Transformer

ROWS = 32  # texts at a time

Tokens = Callable[[list[Request], list["Collected"]], list[list[int]]]


class Collected:
    """The text of one request, token by token."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self.stream, self.parts = TextStream(tokenizer, stop), [""]

    def push(self, token: int) -> bool:
        """True if a stop text has ended it."""
        self.parts.append(self.stream.push(token))
        return self.stream.stopped

    def text(self) -> str:
        return "".join([*self.parts, self.stream.finish()])


def cached_writer(model: Transformer, tokenizer: Tokenizer, seed: int) -> Write:
    """Generates with a cache, on one device."""
    unused = tokenizer.ids_without_text(model.config.vocab_size)

    def tokens(some: list[Request], texts: list[Collected]) -> list[list[int]]:
        def push(place: int, token: int) -> bool:
            return texts[place].push(token)

        first = some[0]
        return decode(
            model, [one.prompt for one in some], first.max_new_tokens, first.sampling, tokenizer.end_ids, seed, push,
            unused, [one.number for one in some],
        )  # fmt: skip

    return functools.partial(write, tokenizer, model.config.max_position_embeddings, tokens)


def called_writer(model: Model, tokenizer: Tokenizer, seed: int) -> Write:
    """Generates by calling the model for each token with the whole text, as sharded models need it."""
    unused = tokenizer.ids_without_text(model.config.vocab_size)

    def tokens(some: list[Request], texts: list[Collected]) -> list[list[int]]:
        first = some[0]
        new = generate(
            model, [one.prompt for one in some], first.max_new_tokens, first.sampling, tokenizer.eos_id, seed, unused,
            [one.number for one in some],
        )  # fmt: skip
        for text, ids in zip(texts, new, strict=True):
            for place, token in enumerate(ids):
                if text.push(token):
                    del ids[place + 1 :]
                    break
        return new

    return functools.partial(write, tokenizer, model.config.max_position_embeddings, tokens)


def write(tokenizer: Tokenizer, limit: int, tokens: Tokens, requests: Sequence[Request]) -> list[Generated]:
    """The texts of all requests, which have the same sampling, ROWS at a time in their order."""
    generated = []
    for start in range(0, len(requests), ROWS):
        some = list(requests[start : start + ROWS])
        texts = [Collected(tokenizer, one.stop) for one in some]
        for one, text, ids in zip(some, texts, tokens(some, texts), strict=True):
            cut = len(ids) >= min(one.max_new_tokens, limit - len(one.prompt)) and not text.stream.stopped
            generated.append(Generated(text.text(), not cut, len(ids)))
    return generated
