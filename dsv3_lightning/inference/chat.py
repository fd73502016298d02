"""A conversation in DeepSeek's format: begin, system text, then <｜User｜>…<｜Assistant｜>…end for every turn.

The cache lives on between turns: only what is new goes through the model.
"""

from collections.abc import Iterator

import torch

from dsv3_lightning.data.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.inference.decoder import Decoder
from dsv3_lightning.inference.sampling import Sampling
from dsv3_lightning.inference.text import TextStream, encode
from dsv3_lightning.model.transformer import Transformer

USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"


def turn_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """Ids of the two marks. Raises ConfigError where the tokenizer has none."""
    user, assistant = (tokenizer.backend.token_to_id(name) for name in (USER, ASSISTANT))
    if user is None or assistant is None:
        raise ConfigError(f"the tokenizer has no {USER} and {ASSISTANT}, which a chat is written with")
    return user, assistant


def conversation(tokenizer: Tokenizer, messages: list[tuple[str, str]]) -> list[int]:
    """Ids of (role, text) messages, ready for the assistant's next. Roles: system, user, assistant. ConfigError."""
    user, assistant = turn_ids(tokenizer)
    ids = [tokenizer.bos_id]
    for role, text in messages:
        words = encode(tokenizer, text)
        if role == "system":
            ids += words
        elif role == "user":
            ids += [user, *words]
        elif role == "assistant":
            ids += [assistant, *words, tokenizer.eos_id]
        else:
            raise ConfigError(f"role={role}: must be system, user or assistant")
    return [*ids, assistant]


class Chat:
    """One conversation with a model. Raises ConfigError, also when it outgrows the context."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, sampling: Sampling, seed: int, system: str) -> None:
        self.tokenizer, self.sampling = tokenizer, sampling
        self.user, self.assistant = turn_ids(tokenizer)
        self.limit = model.config.max_position_embeddings
        self.decoder = Decoder(model, 1, self.limit)
        self.generator = torch.Generator().manual_seed(seed)
        self.pending = [tokenizer.bos_id, *encode(tokenizer, system)]  # not in the cache yet

    def reply(self, text: str, max_new_tokens: int, stop: tuple[str, ...] = ()) -> Iterator[str]:
        """The answer, piece by piece."""
        pending = [*self.pending, self.user, *encode(self.tokenizer, text), self.assistant]
        total = self.decoder.lengths[0] + len(pending)
        if total >= self.limit:
            raise ConfigError(f"the conversation has {total} tokens; the context holds {self.limit}")
        stream = TextStream(self.tokenizer, stop)
        for _ in range(max_new_tokens):
            logits = self.decoder.logits(
                self.decoder.extend(torch.tensor([pending], device=self.decoder.device))[:, -1:]
            )
            (token,) = self.sampling.pick(logits[:, -1], [self.generator])
            pending = [token]
            if token == self.tokenizer.eos_id or self.decoder.lengths[0] >= self.limit:
                break
            yield stream.push(token)
            if stream.stopped:
                break
        self.pending = pending if pending == [self.tokenizer.eos_id] else [*pending, self.tokenizer.eos_id]
        yield stream.finish()
