"""A conversation with a model, in the format of data/text/conversation.py.

The cache persists between turns: only new tokens go through the model.
"""

from collections.abc import Iterable, Iterator
from itertools import chain

import torch

from dsv3_lightning.data.text.conversation import conversation, turn, turn_ids
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.inference.decoder import Decoder, context_of
from dsv3_lightning.inference.sampling import Sampling, random_stream
from dsv3_lightning.inference.text import TextStream, encode
from dsv3_lightning.model.transformer import Transformer


def chat_prompt(tokenizer: Tokenizer, messages: Iterable[tuple[str, str]]) -> list[int]:
    """Token ids of (role, text) messages, up to the start of the assistant's answer. Raises ConfigError."""
    ids = conversation(tokenizer, ((role, encode(tokenizer, text)) for role, text in messages)).ids
    return [*ids, turn_ids(tokenizer)[1]]


class Chat:
    """One conversation with a model, of at most `context` tokens (default: the model's limit). Raises ConfigError.

    A turn is a user message and its answer. If a new turn needs room, the oldest are dropped, but never the system
    message. dropped: the number of turns that the last reply dropped. cut: True if its answer ended because the
    context was full.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        sampling: Sampling,
        seed: int,
        system: str,
        context: int | None = None,
        weights: str = "fp32",
    ) -> None:
        self.tokenizer, self.sampling = tokenizer, sampling
        _, self.assistant = turn_ids(tokenizer)
        self.limit = context_of(model.config, context)
        unused = tokenizer.ids_without_text(model.config.vocab_size)
        self.decoder = Decoder(model, 1, self.limit, lower="--context", unused=unused, weights=weights)
        self.generator = random_stream(seed)
        self.head = conversation(tokenizer, [("system", encode(tokenizer, system))]).ids
        self.turns: list[list[int]] = []
        self.dropped, self.cut = 0, False

    def reset(self) -> None:
        """Deletes all turns."""
        self.turns = []
        self.keep_head_in_cache()

    def keep_head_in_cache(self) -> None:
        """Truncates the cache to the system message; later tokens are recomputed at their new positions."""
        self.decoder.lengths[0] = min(self.decoder.lengths[0], len(self.head))

    def reply(self, text: str, max_new_tokens: int, stop: tuple[str, ...] = ()) -> Iterator[str]:
        """Yields the answer in pieces. Raises ConfigError for a text that can't fit, and changes nothing then."""
        asked = [*turn(self.tokenizer, "user", encode(self.tokenizer, text)), self.assistant]
        self.make_room(len(asked), max_new_tokens)
        self.turns.append(asked)
        pending = [*self.head, *chain.from_iterable(self.turns)][self.decoder.lengths[0] :]
        stream = TextStream(self.tokenizer, stop)
        self.cut = False
        for _ in range(max_new_tokens):
            self.cut = self.decoder.lengths[0] + len(pending) >= self.limit
            if self.cut:
                break
            logits = self.decoder.logits(
                self.decoder.extend(torch.tensor([pending], device=self.decoder.device))[:, -1:]
            )
            (token,) = self.sampling.pick(logits[:, -1], [self.generator])
            pending = [token]
            if token in self.tokenizer.end_ids:
                break
            asked.append(token)
            yield stream.push(token)
            if stream.stopped:
                break
        asked.append(self.tokenizer.eos_id)  # the chat format's end token, whichever one the model wrote
        yield stream.finish()

    def make_room(self, asked: int, max_new_tokens: int) -> None:
        """Drops the oldest turns until `asked` tokens and the answer fit; at most a quarter of the context is reserved
        for the answer. Raises ConfigError."""
        room = max(1, min(max_new_tokens, self.limit // 4))
        least = len(self.head) + asked
        if least >= self.limit:
            raise ConfigError(f"with the system message this turn has {least} tokens; the context holds {self.limit}")
        sizes = [len(turn) for turn in self.turns]
        self.dropped = 0
        while self.dropped < len(sizes) and least + sum(sizes[self.dropped :]) + room > self.limit:
            self.dropped += 1
        if self.dropped:
            del self.turns[: self.dropped]
            self.keep_head_in_cache()
