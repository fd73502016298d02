"""Text of prompts to token ids, and streaming of tokens to text: whole characters, and no part of a stop string."""

import codecs
import re

from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a user's text. Raises ConfigError for lone surrogates, which a wrongly configured terminal sends."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the text is not valid Unicode: character {error.start} is an unpaired surrogate") from error
    return tokenizer.encode(text)


def encode_with_marks(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text in which names of control tokens, such as <｜User｜>, stand for these tokens.

    Only for whole prompts that their author has formatted, never for parts from somebody else.
    """
    marks = {token.content: number for number, token in tokenizer.backend.get_added_tokens_decoder().items()}
    longest_first = sorted(marks, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if marks else [text]
    ids: list[int] = []
    for place, part in enumerate(parts):  # odd ones are names
        ids += [marks[part]] if place % 2 else encode(tokenizer, part)
    return ids


def prompt_ids(tokenizer: Tokenizer, text: str, marks: bool) -> list[int]:
    """Token ids of a prompt, with one begin token. marks: True if names of control tokens stand for these tokens."""
    ids = encode_with_marks(tokenizer, text) if marks else encode(tokenizer, text)
    return ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]


def longest_token(tokenizer: Tokenizer) -> int:
    """The largest number of bytes of text that one token stands for."""
    names = (token.content for token in tokenizer.backend.get_added_tokens_decoder().values())
    return max(int(tokenizer.bytes_per_token().max()), *(len(name.encode()) for name in names))


def whole_characters(text: str) -> str:
    """The text with U+FFFD for every lone surrogate."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class TextStream:
    """A stream of text from tokens: push(token) returns what is final by then, finish() the rest.

    stop: the text ends before the first of these strings; `stopped` is True once one came. An incomplete character at
    the end becomes a replacement character. decoded: the number of characters so far. start: the number of the one that
    the last token's first byte belongs to.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(word for word in stop if word)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""
        self.stopped = False
        self.decoded = self.start = 0

    def push(self, token: int) -> str:
        raw = self.tokenizer.bytes_of(token)
        text = self.decoder.decode(raw[:1])
        incomplete = not raw or self.decoder.getstate()[0]
        self.start = self.decoded + len(text) - (0 if incomplete else 1)
        text += self.decoder.decode(raw[1:])
        self.decoded += len(text)
        return self.release(text, last=False)

    def finish(self) -> str:
        return self.release(self.decoder.decode(b"", True), last=True)

    def release(self, text: str, last: bool) -> str:
        if self.stopped:
            return ""
        self.held += text
        found = [place for place in (self.held.find(word) for word in self.stop) if place >= 0]
        if found:
            self.stopped, ready = True, self.held[: min(found)]
            self.held = ""
            return ready
        keep = 0 if last else self.beginning_of_a_stop()
        ready, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return ready

    def beginning_of_a_stop(self) -> int:
        """The number of characters at the end with which a stop string may begin."""
        longest = max((len(word) for word in self.stop), default=1) - 1
        for size in range(min(longest, len(self.held)), 0, -1):
            if any(word.startswith(self.held[-size:]) for word in self.stop):
                return size
        return 0
