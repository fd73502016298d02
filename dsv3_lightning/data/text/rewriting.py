"""Fill-in-the-middle and split tokens: documents rewritten for training, by numbers drawn from their hash. No torch.

What becomes of a document depends on the seed and its own hash alone, not on its place, so neither on the number of
processes nor on other documents. (DeepSeek-V3, arXiv 2412.19437, §4.1 and §4.2.)
"""

import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dsv3_lightning.data.text.documents import HASHES, hash_of
from dsv3_lightning.data.text.tokenizer import FIM, Tokenizer
from dsv3_lightning.errors import ConfigError

HOLE, BEGIN, END = FIM
# Punctuation with the newlines after it, as one token of V3's pre-tokenization.
COMBINED = re.compile(r"( ?(?:[^\w\s]|_)+)([\r\n]+)")
GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Rewriting:
    """How training documents are rewritten.

    fim_rate: share of the texts that are written as prefix, suffix, middle (PSM). split_rate: share of the tokens of
    punctuation and newlines that become two.
    """

    fim_rate: float
    split_rate: float
    seed: int

    def numbers(self, hash: int) -> list[int]:
        """Three numbers below HASHES for a document."""
        return [hash_of(f"{self.seed} {hash} {number}".encode()) for number in range(3)]

    def parts(self, text: str, hash: int) -> list[str]:
        """The text, or its prefix, suffix and middle where it is to be filled in."""
        if not self.fim_rate:
            return [text]
        chance, *cuts = self.numbers(hash)
        if chance >= self.fim_rate * HASHES:
            return [text]
        first, last = sorted(cut % (len(text) + 1) for cut in cuts)
        return [text[:first], text[last:], text[first:last]]


class Marks:
    """The tokenizer's tokens for rewriting. Raises ConfigError if it has none to fill in with."""

    def __init__(self, tokenizer: Tokenizer, rewriting: Rewriting) -> None:
        self.tokenizer, self.rewriting = tokenizer, rewriting
        found = {name: tokenizer.backend.token_to_id(name) for name in FIM}
        if rewriting.fim_rate and None in found.values():
            lacking = next(name for name, index in found.items() if index is None)
            raise ConfigError(f"data.fim_rate={rewriting.fim_rate}: the tokenizer has no {lacking} to fill in with")
        self.fim = found

    def filled_in(self, parts: list[np.ndarray]) -> np.ndarray:
        """The ids of a text from those of its parts: begin, prefix, hole, suffix, end, middle for three of them."""
        if len(parts) == 1:
            return parts[0]
        prefix, suffix, middle = parts
        begin, hole, end = ([self.fim[name]] for name in (BEGIN, HOLE, END))
        return np.concatenate([begin, prefix, hole, suffix, end, middle]).astype(np.uint32)

    @cached_property
    def halves(self) -> dict[int, list[int]]:
        """For each token of punctuation and newlines, the ids of the two parts."""
        found = {}
        for index in self.tokenizer.ids.tolist():
            if index in self.tokenizer.added:
                continue
            match = COMBINED.fullmatch(self.tokenizer.bytes_of(index).decode("utf-8", "replace"))
            if match is not None and "\ufffd" not in match[0]:
                found[index] = [*self.tokenizer.encode(match[1]), *self.tokenizer.encode(match[2])]
        return found

    @cached_property
    def combined(self) -> np.ndarray:
        """Whether an id is in `halves`: bool [vocab_size]."""
        found = np.zeros(self.tokenizer.vocab_size, dtype=bool)
        found[list(self.halves)] = True
        return found

    def split(self, ids: np.ndarray, hash: int) -> np.ndarray:
        """The ids of a document's text with a share of the combined tokens as two."""
        if not self.rewriting.split_rate:
            return ids
        places = np.flatnonzero(self.combined[ids])
        if not len(places):
            return ids
        chances = mixed(np.uint64(hash_of(f"{self.rewriting.seed} {hash}".encode())), np.arange(len(places)))
        chosen = places[chances < self.rewriting.split_rate * HASHES]
        parts, begin = [], 0
        for place in chosen.tolist():
            parts += [ids[begin:place], np.array(self.halves[int(ids[place])], dtype=ids.dtype)]
            begin = place + 1
        return np.concatenate([*parts, ids[begin:]])


def mixed(seed: np.uint64, numbers: np.ndarray) -> np.ndarray:
    """A number below HASHES for each of 0, 1, 2, …: SplitMix64's, uint64 [n]."""
    with np.errstate(over="ignore"):
        z = seed + (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
