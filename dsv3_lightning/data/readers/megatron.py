"""Documents of Megatron-LM's token files (`.idx` with `.bin` beside it), as text again, by the tokenizer they were made
with.

    .idx: MMIDIDX\\0\\0, version 1 as uint64, code of the type as uint8, counts of sequences and of document bounds as
    uint64; then lengths int32 [sequences], byte offsets int64 [sequences], bounds int64 [documents + 1] in sequences
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError

MAGIC = b"MMIDIDX\x00\x00"
TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
HEADER = len(MAGIC) + 8 + 1 + 8 + 8


def documents_of(index: Path, tokenizer: Tokenizer, where: str) -> Iterator[str]:
    """Yields the text of each document, without special tokens. where: setting and file, for messages.

    Raises ConfigError for other files, and for files that don't belong together.
    """
    content = index.read_bytes()
    if not content.startswith(MAGIC) or len(content) < HEADER:
        raise ConfigError(f"{where}: is no index of Megatron's token files (it does not begin with MMIDIDX)")
    version, code, sequences, bounds = struct.unpack_from("<QBQQ", content, len(MAGIC))
    if version != 1 or TYPES.get(code, "f")[-2] == "f":
        raise ConfigError(
            f"{where}: version {version} and type {code} of token files are not read; needs 1 and integers"
        )
    dtype = np.dtype(TYPES[code])
    if len(content) != HEADER + 12 * sequences + 8 * bounds:
        raise ConfigError(
            f"{where}: has {len(content)} bytes in place of {HEADER + 12 * sequences + 8 * bounds}; it is cut off"
        )
    lengths = np.frombuffer(content, "<i4", sequences, HEADER)
    starts = np.frombuffer(content, "<i8", sequences, HEADER + 4 * sequences)
    documents = np.frombuffer(content, "<i8", bounds, HEADER + 12 * sequences)
    data = index.with_suffix(".bin")
    size = data.stat().st_size if data.exists() else -1
    if sequences and size < int((starts + lengths.astype(np.int64) * dtype.itemsize).max()):
        raise ConfigError(f"{where}: {data.name} is missing or shorter than its index says")
    if not size:
        return
    tokens = np.memmap(data, "u1", "r")
    for begin, end in zip(documents[:-1], documents[1:]):
        spans = [(int(starts[i]), int(starts[i]) + int(lengths[i]) * dtype.itemsize) for i in range(begin, end)]
        ids = np.concatenate([np.frombuffer(tokens[a:b].tobytes(), dtype) for a, b in spans] or [np.empty(0, dtype)])
        yield tokenizer.decode(ids.tolist(), skip_special_tokens=True)
