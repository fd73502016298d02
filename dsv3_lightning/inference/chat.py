"""A conversation with a model, in the format of data/conversation.py.

The cache lives on between turns: only what is new goes through the model.
"""

from collections.abc import Iterable, Iterator

import torch

from dsv3_lightning.data.text.conversation import conversation, turn, turn_ids
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.inference.decoder import Decoder, context_of
from dsv3_lightning.inference.sampling import Sampling, random_stream
from dsv3_lightning.inference.text import TextStream, encode
from dsv3_lightning.model.transformer import Transformer


def chat_prompt(tokenizer: Tokenizer, messages: Iterable[tuple[str, str]]) -> list[int]:
    """Ids of (role, text) messages, ready for the assistant's next. ConfigError."""
    ids = conversation(tokenizer, ((role, encode(tokenizer, text)) for role, text in messages)).ids
    return [*ids, turn_ids(tokenizer)[1]]


class Chat:
    """One conversation with a model, of at most `context` tokens (default: the model's limit). Raises ConfigError, also
    when it outgrows them."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        sampling: Sampling,
        seed: int,
        system: str,
        context: int | None = None,
    ) -> None:
        self.tokenizer, self.sampling = tokenizer, sampling
        _, self.assistant = turn_ids(tokenizer)
        self.limit = context_of(model.config, context)
        unused = tokenizer.ids_without_text(model.config.vocab_size)
        self.decoder = Decoder(model, 1, self.limit, lower="--context", unused=unused)
        self.generator = random_stream(seed)
        self.pending = conversation(tokenizer, [("system", encode(tokenizer, system))]).ids  # not in the cache yet

    def reply(self, text: str, max_new_tokens: int, stop: tuple[str, ...] = ()) -> Iterator[str]:
        """The answer, piece by piece."""
        asked = turn(self.tokenizer, "user", encode(self.tokenizer, text))
        pending = [*self.pending, *asked, self.assistant]
        total = self.decoder.lengths[0] + len(pending)
        if total >= self.limit:
            raise ConfigError(f"the conversation has {total} tokens; the context holds {self.limit}")
        stream = TextStream(self.tokenizer, stop)
        for _ in range(max_new_tokens):
            logits = self.decoder.logits(
                self.decoder.extend(torch.tensor([pending], device=self.decoder.device))[:, -1:]
            )
            (token,) = self.sampling.pick(logits[:, -1], [self.generator])
            pending = [] if token in self.tokenizer.end_ids else [token]
            if not pending or self.decoder.lengths[0] >= self.limit:
                break
            yield stream.push(token)
            if stream.stopped:
                break
        self.pending = [*pending, self.tokenizer.eos_id]  # the format's, whichever end the model wrote
        yield stream.finish()
