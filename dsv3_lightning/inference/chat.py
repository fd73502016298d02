"""A conversation with a model, in the format of data/conversation.py.

The cache lives on between turns: only what is new goes through the model.
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
    """Ids of (role, text) messages, ready for the assistant's next. ConfigError."""
    ids = conversation(tokenizer, ((role, encode(tokenizer, text)) for role, text in messages)).ids
    return [*ids, turn_ids(tokenizer)[1]]


class Chat:
    """One conversation with a model, of at most `context` tokens (default: the model's limit). Raises ConfigError.

    A turn is what the user said and the answer. Where a new one needs the room, the oldest are dropped, never the
    system message. dropped: how many the last reply dropped. cut: whether its answer ended because the context was
    full.
    """

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
        self.head = conversation(tokenizer, [("system", encode(tokenizer, system))]).ids
        self.turns: list[list[int]] = []
        self.dropped, self.cut = 0, False

    def reset(self) -> None:
        """Forgets all turns."""
        self.turns = []
        self.keep_head_in_cache()

    def keep_head_in_cache(self) -> None:
        """What follows the system message goes through the model again, at its new place."""
        self.decoder.lengths[0] = min(self.decoder.lengths[0], len(self.head))

    def reply(self, text: str, max_new_tokens: int, stop: tuple[str, ...] = ()) -> Iterator[str]:
        """The answer, piece by piece. Raises ConfigError, and leaves all as it is, for a text that can never fit."""
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
        asked.append(self.tokenizer.eos_id)  # the format's, whichever end the model wrote
        yield stream.finish()

    def make_room(self, asked: int, max_new_tokens: int) -> None:
        """Drops as many of the oldest turns as it takes for a turn that begins with so many tokens, and for its answer,
        but for that at most a quarter of the context. Raises ConfigError."""
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
