"""Checks of prepared token files: every hash, and that the parts of each shard belong together. Imports no torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_lightning.common.files import digest, reason_of
from dsv3_lightning.data.text.store import mapped, shards_of

IDS = 1 << 22  # checked at a time


def damages(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """Yields what is damaged: each file with what is wrong. manifest: of the folder."""
    damaged = set()
    for name, file in manifest["files"].items():
        try:
            size = (folder / name).stat().st_size
            found = digest(folder / name) if size == file["bytes"] else None
        except OSError as error:
            damaged.add(name)
            yield f"{name}: {reason_of(error)}"
            continue
        if found != file["sha256"]:
            damaged.add(name)
            yield f"{name}: " + (
                f"has {size:,} bytes, was written with {file['bytes']:,}"
                if found is None
                else f"its sha256 begins with {found[:8]}, was written with {file['sha256'][:8]}"
            )
    for split in manifest["splits"]:
        documents = tokens = 0
        shards = shards_of(manifest, split)
        for shard in shards:
            if not damaged & {f"{shard}{end}" for end in (".bin", ".idx", ".src", ".ans")}:
                yield from (f"{shard}: {what}" for what in contradictions(folder, manifest, shard))
                documents += manifest["files"][f"{shard}.idx"]["bytes"] // 8 - 1
                tokens += manifest["files"][f"{shard}.bin"]["bytes"] // np.dtype(manifest["dtype"]).itemsize
        expected = manifest["splits"][split]
        if not damaged and (documents, tokens) != (expected["documents"], expected["tokens"]):
            yield f"{split}: holds {documents:,} documents and {tokens:,} tokens, the manifest counts others"


def contradictions(folder: Path, manifest: dict[str, Any], shard: str) -> Iterator[str]:
    """Yields what in a shard's files doesn't fit together."""
    tokens = mapped(folder / f"{shard}.bin", manifest["dtype"])
    offsets, origins = mapped(folder / f"{shard}.idx", "<i8"), mapped(folder / f"{shard}.src", "<u2")
    if offsets[0] != 0 or offsets[-1] != len(tokens) or (np.diff(offsets) <= 0).any():
        yield "its documents don't make up its tokens"
    if len(origins) != len(offsets) - 1 or (origins >= len(manifest["origins"])).any():
        yield "its documents' origins aren't those of the manifest"
    vocab_size = manifest["tokenizer"]["vocab_size"]
    if any((tokens[begin : begin + IDS] >= vocab_size).any() for begin in range(0, len(tokens), IDS)):
        yield f"has ids at or above the vocabulary's size {vocab_size}"
    if f"{shard}.ans" in manifest["files"]:
        spans = mapped(folder / f"{shard}.ans", "<i8")
        if len(spans) % 2 or (np.diff(spans) <= 0).any() or (len(spans) and spans[-1] > len(tokens)):
            yield "its spans of trained tokens don't rise within its tokens"
