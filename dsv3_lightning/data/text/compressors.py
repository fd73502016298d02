"""What gzip and xz need for the validation text of each source, beside which bits per byte are read. Imports no torch.

A compressor gets each document alone, as a model does whose samples begin anywhere. With all documents of a source in
one stream it also learns from those before, which is the other figure.
"""

import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_lightning.common.files import write_file
from dsv3_lightning.common.strict_json import strict_json
from dsv3_lightning.data.text.store import TokenFile, read_manifest
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import WriteError

FILE = "validation/compressed.json"
MOST = 1 << 24  # bytes of a source's text that are compressed, of every n-th document: xz takes 3 MB a second

Facts = dict[str, Any]


def compressed_sources(folder: Path, tokenizer: Tokenizer) -> dict[str, Facts]:
    """`compressed` of each source of a prepared folder, by name; kept in the folder if it can be written."""
    path = folder / FILE
    try:
        found: dict[str, Facts] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        names, file = read_manifest(folder)["origins"], TokenFile(folder, "validation")
        found = {name: compressed(texts) for name, texts in zip(names, texts_of(file, tokenizer, len(names)))}
        try:
            write_file(path, strict_json(found, indent=1, ensure_ascii=False))
        except (OSError, WriteError):  # of another user; it is computed again next time
            pass
    return found


def compressed(texts: Iterable[bytes]) -> Facts:
    """Bits per byte of gzip -9 and xz -6 for each text alone and for all in one stream; None without text.

    >>> facts = compressed([b"abcabc" * 50] * 9)
    >>> facts["documents"], facts["bytes"], facts["xz_bpb"] > facts["gzip_bpb"] > facts["gzip_stream_bpb"]
    (9, 2700, True)
    """
    gzip, xz = gzip_stream(), lzma.LZMACompressor(lzma.FORMAT_XZ)
    documents = size = 0
    sums = dict.fromkeys(("gzip", "xz", "gzip_stream", "xz_stream"), 0)
    for text in texts:
        documents, size = documents + 1, size + len(text)
        alone = gzip_stream()
        sums["gzip"] += len(alone.compress(text)) + len(alone.flush())
        sums["xz"] += len(lzma.compress(text, lzma.FORMAT_XZ))
        sums["gzip_stream"] += len(gzip.compress(text))
        sums["xz_stream"] += len(xz.compress(text))
    sums["gzip_stream"] += len(gzip.flush())
    sums["xz_stream"] += len(xz.flush())
    per_byte = {f"{name}_bpb": 8 * total / size if size else None for name, total in sums.items()}
    return {"documents": documents, "bytes": size, **per_byte}


def gzip_stream() -> Any:
    return zlib.compressobj(9, zlib.DEFLATED, 31)  # 31: with gzip's header and trailer


def texts_of(file: TokenFile, tokenizer: Tokenizer, origins: int) -> Iterator[Iterator[bytes]]:
    """Yields, for each origin, the texts of its documents that are predicted, or of every n-th where they are long."""
    of_documents, offsets, spans = file.origins(), file.offsets(), file.loss_spans()
    sizes = tokenizer.bytes_per_token()
    for origin in range(origins):
        own = np.flatnonzero(of_documents == origin)
        tokens = int((offsets[own + 1] - offsets[own]).sum())
        some = file.tokens[slice(int(offsets[own[0]]), int(offsets[own[0]]) + 100_000)] if len(own) else sizes[:0]
        total = tokens * float(sizes[some].mean()) if len(own) else 0.0
        yield (
            text_of(file, tokenizer, int(offsets[document]), int(offsets[document + 1]), spans)
            for document in own[:: max(1, round(total / MOST))]
        )


def text_of(file: TokenFile, tokenizer: Tokenizer, begin: int, end: int, spans: np.ndarray | None) -> bytes:
    """The bytes of the tokens begin .. end - 1 that are trained on, without control tokens."""
    ids = np.asarray(file.tokens[begin:end])
    if spans is not None:
        ids = ids[np.searchsorted(spans, np.arange(begin, end), "right") % 2 == 1]
    return b"".join(tokenizer.bytes_of(token) for token in ids.tolist() if token not in tokenizer.control_ids)
