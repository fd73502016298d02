"""From tokens to text as it comes: whole characters only, and never a part of a stop string."""

import codecs
import re

from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of what a user gave. Raises ConfigError for half characters, as a wrongly coded terminal makes them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the text is no Unicode: its character {error.start} is a half one") from error
    return tokenizer.encode(text)


def encode_with_marks(tokenizer: Tokenizer, text: str) -> list[int]:
    """The same, but the name of a control token, such as <｜User｜>, is that token and not plain text.

    For a whole prompt that its author has formatted; never for a part that came from somebody else.
    """
    marks = {token.content: number for number, token in tokenizer.backend.get_added_tokens_decoder().items()}
    longest_first = sorted(marks, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if marks else [text]
    ids: list[int] = []
    for place, part in enumerate(parts):  # every second one is a name
        ids += [marks[part]] if place % 2 else encode(tokenizer, part)
    return ids


def prompt_ids(tokenizer: Tokenizer, text: str, marks: bool) -> list[int]:
    """A prompt that begins with the begin token, once. marks: whether names of control tokens are these tokens."""
    ids = encode_with_marks(tokenizer, text) if marks else encode(tokenizer, text)
    return ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]


def longest_token(tokenizer: Tokenizer) -> int:
    """Bytes of text that one token stands for, at most."""
    names = (token.content for token in tokenizer.backend.get_added_tokens_decoder().values())
    return max(int(tokenizer.bytes_per_token().max()), *(len(name.encode()) for name in names))


def whole_characters(text: str) -> str:
    """The text with U+FFFD for every half character (a surrogate without its other half)."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class TextStream:
    """push(token) gives the text that is certain by now, finish() the rest; joined they are the whole text.

    stop: the text ends before the first of these strings; `stopped` says that one came. A character whose last bytes
    never come is one replacement sign at the end.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(word for word in stop if word)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        return self.release(self.decoder.decode(self.tokenizer.bytes_of(token)), last=False)

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
        """Characters at the end that a stop string may begin with."""
        longest = max((len(word) for word in self.stop), default=1) - 1
        for size in range(min(longest, len(self.held)), 0, -1):
            if any(word.startswith(self.held[-size:]) for word in self.stop):
                return size
        return 0
