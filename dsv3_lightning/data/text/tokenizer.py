"""Byte-level BPE with DeepSeek-V3's pre-tokenization and special tokens (V3 §4.1). Imports no torch.

Text never becomes a control token: documents are encoded with all control tokens disabled, and the ids of begin and end
are added as integers. Added tokens that are text, such as letters or runs of spaces, are matched in it, as in
transformers. Every string round-trips: decode(encode(text)) == text.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from dsv3_lightning.common.files import FileRecord, write_file
from dsv3_lightning.common.json_files import read_text
from dsv3_lightning.common.paths import user_path
from dsv3_lightning.data.text.token_names import BOS, EOS, PAD, absent, added_tokens, find_names, is_control, parse
from dsv3_lightning.errors import ConfigError

FIM = ("<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>")
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
SPECIAL_TOKENS = (BOS, EOS, PAD, *FIM, USER, ASSISTANT, "<|EOT|>")  # ids 0, 1, 2, … when trained here

# The three splits of V3's tokenizer.json, applied in order: groups of three digits; runs of Chinese and kana; and the
# rest: punctuation with letters, words with their space, punctuation with its newlines, newlines, other spaces.
SPLITS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)
# Those of DeepSeek LLM (arXiv 2401.02954, §2.1): line ends, words of scripts with two cases, punctuation, spaces at the
# end, Chinese and other scripts without cases, single digits. The third has the range from : to ~ as published,
# with the ASCII letters in it, and therefore cuts words at other letters.
LLM_SPLITS = (
    r"[\r\n]",
    r"\s?[\p{Ll}\p{Lu}\p{Lt}]+",
    "\\s?[!-/:-~！-／：-～\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    r"\p{N}",
)
PRETOKENIZATIONS = {"v3": SPLITS, "llm": LLM_SPLITS}
PIECE = 1 << 18  # characters encoded at a time: linear time for huge documents, and work for every core
GROUP = 1 << 22  # characters per call of the library, whose result takes some 150 bytes per token
SEAM = re.compile(r"\n(?=\w)|\w(?= \w)")  # SPLITS always begins a new token after a match
ENDLESS = re.compile(r"\w+|\s+|[^\w\s]+")
# What lossy tokenizers change: spaces, case, line ends, accents, marks, control tokens.
PROBE = " x  1234 Don't\r\n\te\u0301 é\ufeff\0 中文かな \U0001f469\u200d\U0001f680" + BOS


PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # written as themselves by byte-level BPE
BYTES = {chr(byte): byte for byte in PRINTABLE} | {
    chr(256 + place): byte for place, byte in enumerate(sorted(set(range(256)) - set(PRINTABLE)))
}


class Tokenizer:
    """The tokenizer of a tokenizer.json's text. bos, eos, pad: names of its tokens. Raises ConfigError if lossy."""

    def __init__(self, serialized: str, bos: str = BOS, eos: str = EOS, pad: str = PAD) -> None:
        self.serialized, self.names = serialized, (bos, eos, pad)
        self.sha256 = hashlib.sha256(serialized.encode()).hexdigest()
        description = parse(serialized)
        self.backend = backend_of(description, self.names)
        added = self.backend.get_added_tokens_decoder()
        special = {token["content"] for token in added_tokens(description) if token.get("special")} | set(self.names)
        self.added = {index: token.content for index, token in added.items()}
        self.control_ids = {index for index, token in added.items() if token.special}  # never matched in text
        self.special_ids = {index for index, name in self.added.items() if name in special}  # skipped on request
        self.bytes_by_id: dict[int, bytes] = {}
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.ids = np.unique(np.fromiter(vocabulary.values(), dtype=np.int64, count=len(vocabulary)))
        self.bos_id, self.eos_id, self.pad_id = (vocabulary[name] for name in self.names)
        self.end_ids = {self.eos_id}  # tokens that end generation; imported models may have several
        self.chat_template: str | None = None  # an imported model's, if it has one
        self.vocab_size = int(self.ids[-1]) + 1  # not the number of ids, which may have gaps
        ids = self.encode(PROBE)
        plain = [index for index in ids if index not in self.added]  # the library garbles added letters such as ø
        if self.decode(ids) != PROBE or self.backend.decode(plain) != self.decode(plain):
            raise ConfigError("does not reproduce every text; use a byte-level BPE without normalizer or added spaces")

    def __reduce__(self) -> tuple[Any, ...]:  # a pickled backend loses that text can't contain control tokens
        return Tokenizer, (self.serialized, *self.names)

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Reads a tokenizer.json, or the one in a folder.

        The end token is that of the tokenizer_config.json next to it, else V3's; begin and padding are the tokens with
        V3's names, else those of that file, else the end token.

        Raises ConfigError that names the file.
        """
        file = user_path(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.exists():
            raise ConfigError(absent(file))
        serialized = read_text(file)
        try:
            description = parse(serialized)
            return cls(serialized, *find_names(description, file.parent))
        except ConfigError as error:
            named = str(error).startswith(str(file.parent))
            raise ConfigError(str(error) if named else f"{file}: {error}") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, pretokenization: str = "v3") -> "Tokenizer":
        """Trains merges until there are `vocab_size` entries, special tokens included, or nothing is left to merge.

        pretokenization: a name in PRETOKENIZATIONS.
        """
        backend = Backend(models.BPE())
        patterns = PRETOKENIZATIONS[pretokenization]
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, so that nothing is unknown
            show_progress=False,
        )
        pieces = (piece for text in texts for piece in cut(text))
        backend.train_from_iterator((part for piece in pieces for part in without_endless_words(piece)), trainer)
        return cls(backend.to_str())

    def ending_with(self, end: str | None) -> "Tokenizer":
        """This tokenizer with another end token (`data.end_token`), or unchanged for None. Raises ConfigError."""
        if end is None:
            return self
        check_end(end, [self.added[index] for index in sorted(self.control_ids)])
        return Tokenizer(self.serialized, self.names[0], end, self.names[2])

    def save(self, folder: Path) -> dict[str, FileRecord]:
        """Writes the files for `AutoTokenizer.from_pretrained(folder)`; returns them by name."""
        bos, eos, pad = self.names
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": pad,
            "clean_up_tokenization_spaces": False,
        }
        files = {"tokenizer.json": self.serialized, "tokenizer_config.json": json.dumps(config, ensure_ascii=False)}
        return {name: write_file(folder / name, text) for name, text in files.items()}

    def encode(self, text: str) -> list[int]:
        """Ids of the text without begin and end, and never those of control tokens."""
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, uint32 [n], on all cores."""
        pieces = [cut(text) for text in texts]
        ids = self._encode_pieces([piece for of_text in pieces for piece in of_text])
        return [np.concatenate([next(ids) for _ in of_text]) for of_text in pieces]

    def _encode_pieces(self, pieces: list[str]) -> Iterator[np.ndarray]:
        while pieces:
            size, count = 0, 0
            while count < len(pieces) and size < GROUP:
                size, count = size + len(pieces[count]), count + 1
            for encoding in self.backend.encode_batch_fast(pieces[:count], add_special_tokens=False):
                yield np.array(encoding.ids, dtype=np.uint32)
            pieces = pieces[count:]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of the ids, with U+FFFD if they stop inside a character."""
        kept = [index for index in ids if not (skip_special_tokens and index in self.special_ids)]
        return b"".join(map(self.bytes_of, kept)).decode("utf-8", "replace")

    def bytes_of(self, token: int) -> bytes:
        """The bytes of one id in text: the name of a control token, nothing for an unused id."""
        if token not in self.bytes_by_id:
            name = self.added.get(token)
            self.bytes_by_id[token] = (
                plain_bytes(self.backend.id_to_token(token) or "") if name is None else name.encode()
            )
        return self.bytes_by_id[token]

    def bytes_per_token(self) -> np.ndarray:
        """Number of bytes of text for each id, int64 [vocab_size]; 0 for control tokens and unused ids."""
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self.backend.get_vocab(with_added_tokens=False).items():
            sizes[index] = len(plain_bytes(token))
        for index, name in self.added.items():
            sizes[index] = 0 if index in self.control_ids else len(name.encode())
        return sizes

    def text_tokens(self) -> list[str]:
        """The added tokens that are matched in text."""
        return sorted(name for index, name in self.added.items() if index not in self.control_ids)

    def ids_without_text(self, rows: int) -> list[int]:
        """The ids from 0 to rows - 1 that have no token."""
        return np.setdiff1d(np.arange(rows), self.ids).tolist()


def plain_bytes(name: str) -> bytes:
    """The bytes that a byte-level BPE token's name encodes; for any other name its UTF-8 bytes, as the library does."""
    try:
        return bytes([BYTES[character] for character in name])
    except KeyError:
        return name.encode("utf-8", "replace")


def backend_of(description: dict[str, Any], names: Sequence[str]) -> Backend:
    """The library's tokenizer, set up to never truncate, pad or match a control token in text. Raises ConfigError.

    names: additional control tokens.
    """
    guarded = [token | {"special": is_control(token)} for token in added_tokens(description)]
    description = description | {"truncation": None, "padding": None, "added_tokens": guarded}
    try:
        backend = Backend.from_str(json.dumps(description))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"not a tokenizer.json that the tokenizers library can read ({error})") from error
    backend.add_special_tokens([name for name in names if backend.token_to_id(name) is not None])
    backend.encode_special_tokens = True
    return backend


def check_end(end: str, known: Sequence[str]) -> None:
    """Raises ConfigError unless the end is a control token, which encoded text never contains."""
    if end not in known:
        listed = " ".join(known[:12]) + (f" and {len(known) - 12} more" if len(known) > 12 else "")
        raise ConfigError(f"data.end_token={end}: the tokenizer has no such control token; it has {listed}")


def without_endless_words(text: str, block: int = 1000) -> Iterator[str]:
    """Yields the text without long runs of only letters, spaces or punctuation, such as an image in base64.

    They are useless for training a tokenizer, which takes time quadratic in the length of a word.
    """
    start = 0
    for here in range(0, len(text), block):
        inside = text[here : here + block]
        if len(inside) == block and len(inside.split(None, 1)) < 2 and ENDLESS.fullmatch(inside):
            yield text[start:here]
            start = here + block
    yield text[start:]


def cut(text: str, size: int = PIECE) -> list[str]:
    """The text in pieces of at most `size` characters, cut before a line or word if one begins near the end.

    Such cuts don't change the tokens. Cuts inside an endless word may, but never the bytes.
    """
    pieces, start = [], 0
    while len(text) - start > size:
        seams = list(SEAM.finditer(text, start + size - min(size, 4096), start + size))
        end = seams[-1].end() if seams else start + size
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]
