"""Encoding of texts by fastokens where it gives what the tokenizers library gives, else by that. Imports no torch."""

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from dsv3_lightning.data.text.progress import say
from dsv3_lightning.data.text.token_names import BOS, EOS
from dsv3_lightning.data.text.tokenizer import USER, Tokenizer, cut

SLOW = 1 << 27  # bytes of text from which the slower library is worth a line
# What encoders differ in: control tokens in text, spaces, line ends, digits, accents, scripts, invalid combinations.
PROBES = (
    f"a{EOS}b {BOS}{USER}<think>x</think> <|EOT|>",
    "  x\t\t y \r\n\r\n  z\n\n\n",
    "1234567 3.14 ١٢٣ ⅷ ²",
    "e\u0301 é\u0301\u0327 \ufeff\0\x7f \u200d\u200b \ufffd",
    "中文，日本語のテスト。한국어 ไทย हिन्दी العربية עברית",
    "don't I'LL we've !!\n?!\n\n …”\r\n (x)\n {y};\n",
    "\U0001f469\u200d\U0001f680\U0001f1e9\U0001f1ea ™ \u2028\u2029\x85 ",
)


class Encoder:
    """The tokenizer, and fastokens' for the same ids where `fast`."""

    def __init__(self, tokenizer: Tokenizer, fast: bool = False) -> None:
        self.tokenizer, self.fast = tokenizer, fast
        self.backend = fast_backend(tokenizer) if fast else None

    def __reduce__(self) -> tuple[Any, ...]:
        return Encoder, (self.tokenizer, self.fast)

    @property
    def name(self) -> str:
        """The library with its version."""
        library = "fastokens" if self.fast else "tokenizers"
        return f"{library} {version(library)}"

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, uint32 [n], never those of control tokens."""
        if self.backend is None:
            return self.tokenizer.encode_batch(texts)
        pieces = [cut(text) for text in texts]
        flat = [piece for of_text in pieces for piece in of_text]
        ids, ends = self.backend.encode_batch_flat(flat, split_special_tokens=True)
        found, bounds = np.frombuffer(ids, "<u4"), np.frombuffer(ends, "<u8").astype(np.int64)
        cuts = np.cumsum([0, *map(len, pieces)])
        return [found[bounds[a] : bounds[b]] for a, b in zip(cuts[:-1].tolist(), cuts[1:].tolist())]


def fast_backend(tokenizer: Tokenizer) -> Any:
    """Raises ImportError without fastokens, and whatever it raises for tokenizers that it can't read."""
    import fastokens

    return fastokens.Tokenizer.from_json_str(tokenizer.backend.to_str())


def best_encoder(tokenizer: Tokenizer, texts: Iterable[str], size: int) -> Encoder:
    """fastokens if it is installed and equal on all the texts, else tokenizers. size: bytes that are to be encoded."""
    given = [*texts, *PROBES]
    why = differs(tokenizer, given)
    if why is None:
        return Encoder(tokenizer, fast=True)
    if size >= SLOW or not why.startswith("fastokens is not installed"):
        say(f"encoding by tokenizers, some ten times slower: {why}")
    return Encoder(tokenizer)


def differs(tokenizer: Tokenizer, texts: Sequence[str]) -> str | None:
    """Why fastokens can't encode in place of tokenizers; None if it gives the same for the texts."""
    try:
        fast = Encoder(tokenizer, fast=True)
    except ImportError:
        return "fastokens is not installed (pip install 'dsv3-lightning[data]')"
    except Exception as error:  # the library raises nothing narrower
        return f"fastokens can't read this tokenizer ({' '.join(str(error).split())})"
    for number, (a, b) in enumerate(zip(tokenizer.encode_batch(texts), fast.encode_batch(texts), strict=True)):
        if not np.array_equal(a, b):
            return f"fastokens gives other ids for {texts[number][:60]!r}"
    return None
