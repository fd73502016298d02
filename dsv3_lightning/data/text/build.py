"""Preparation in three passes over a corpus of any size: survey, train the tokenizer, encode. Imports no torch."""

import hashlib
import json
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv3_lightning.common.files import utf8_path
from dsv3_lightning.data.config import DataConfig
from dsv3_lightning.data.text.conversation import Message, conversation
from dsv3_lightning.data.text.corpus import read_documents
from dsv3_lightning.data.text.progress import progress
from dsv3_lightning.data.text.sources import Source, main_origins
from dsv3_lightning.data.text.store import FORMAT, TokenWriter, token_dtype, write_manifest
from dsv3_lightning.data.text.tally import ReadStats, notes
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError

SPLITS = ("train", "validation")
HASHES = 1 << 64
BATCH = 1 << 22  # bytes of text that are encoded together
TRAINING_BYTES = 1 << 31  # the tokenizer learns from so much at most: the library's 32-bit pair counts would overflow


class Document(NamedTuple):
    """A text or a conversation with its hash below HASHES, which is the same in every process and on every machine.

    texts: the text, or that of each message. learned: the messages that are trained on. size: UTF-8 bytes of all texts.
    loss_text: UTF-8 bytes that are trained on. origin: index into the manifest's `origins`.
    """

    roles: list[str] | None
    texts: list[str]
    learned: list[bool]
    size: int
    loss_text: bytes
    hash: int
    origin: int

    @classmethod
    def of(cls, found: str | list[Message], origin: int) -> "Document":
        if isinstance(found, str):
            utf8 = found.encode()
            return cls(None, [found], [], len(utf8), utf8, hash_of(utf8), origin)
        roles, texts = [message.role for message in found], [message.text for message in found]
        learned = [message.learned for message in found if message.role == "assistant"]
        loss_text = "".join(message.text for message in found if message.learned).encode()
        size = sum(len(text.encode()) for text in texts)
        said = json.dumps(list(zip(roles, texts)))  # without `learned`, so that it stays on the same side of the split
        return cls(roles, texts, learned, size, loss_text, hash_of(said.encode()), origin)


def build(
    folder: Path,
    config: DataConfig,
    sources: list[Source],
    left_out: Mapping[str, int],
    tokenizer: Tokenizer | None,
    inputs: dict[str, Any],
) -> dict[str, Any]:
    """Writes token files, tokenizer and manifest to the folder; returns the manifest. Raises ConfigError without text.

    left_out: numbers of unread files by suffix, for the manifest.
    """
    folder.mkdir()
    stats = ReadStats()
    with progress("reading", None) as advance:
        hashes, text_bytes = survey(read_hashed(sources, config, stats), advance)
    if not hashes:
        given = config.paths or (config.sources and f"of {', '.join(config.sources)}") or "the standard library"
        why = "".join(f"; {note.removeprefix('data.paths: ')}" for note in notes(stats.facts(), len(sources), {}))
        raise ConfigError(f"data.paths={given}: no text in {len(sources)} files{why}")
    last_validation = validation_threshold(hashes, config.validation_fraction)

    if tokenizer is None:
        with progress("learning the tokenizer", text_bytes) as advance:
            documents = read_hashed(sources, config)
            texts = training_texts(documents, last_validation, TRAINING_BYTES / max(text_bytes, 1), advance)
            tokenizer = Tokenizer.train(texts, config.vocab_size).ending_with(config.end_token)
    with progress("encoding", text_bytes) as advance:
        encoded = encode(read_hashed(sources, config), last_validation, tokenizer, folder, advance)
    manifest = {
        "format": FORMAT,
        "dtype": token_dtype(tokenizer.vocab_size),
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256},
        **stats.facts(),
        "files_read": len(sources),
        "files_left_out": dict(left_out),
        "origins": origin_names(sources),
        **encoded,
        "inputs": inputs,
    }
    manifest["files"] |= tokenizer.save(folder)
    write_manifest(folder, manifest)
    return manifest


def read_hashed(sources: list[Source], config: DataConfig, stats: ReadStats | None = None) -> Iterator[Document]:
    names, numbers = main_origins(sources), {name: number for number, name in enumerate(origin_names(sources))}
    for source in sources:
        for found in read_documents([source], config.text_key, stats, config.skip_bad_lines):
            yield Document.of(found, numbers[names[source.origin]])


def hash_of(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def origin_names(sources: list[Source]) -> list[str]:
    """Names of the origins, the largest first and `others` last."""
    return list(dict.fromkeys(main_origins(sources).values()))


def survey(documents: Iterable[Document], advance: Callable[[int], None]) -> tuple[Sequence[int], int]:
    """The hash of each document, and the total bytes."""
    hashes, text_bytes = array("Q"), 0
    for document in documents:
        hashes.append(document.hash)
        text_bytes += document.size
        advance(document.size)
    return hashes, text_bytes


def validation_threshold(hashes: Iterable[int], fraction: float) -> int:
    """The largest hash of a validation document, so that equal texts stay together; -1 for fraction 0.

    About `fraction` of the documents are at or below it. With at least two different documents, each split has one.
    """
    if not fraction:
        return -1
    return min(max(int(fraction * HASHES) - 1, min(hashes)), max(hashes) - 1)


def training_texts(
    documents: Iterable[Document], last_validation: int, share: float, advance: Callable[[int], None]
) -> Iterator[str]:
    """The training split's texts, or about `share` of them, chosen by a hash independent of the split's."""
    for document in documents:
        advance(document.size)
        chosen = document.hash * 0x9E3779B97F4A7C15 % HASHES < share * HASHES
        if document.hash > last_validation and chosen:
            yield from document.texts


def encode(
    documents: Iterable[Document],
    last_validation: int,
    tokenizer: Tokenizer,
    folder: Path,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Writes both splits; returns their entries for the manifest and the size of the validation text under gzip -9.

    In conversations gzip compresses only the assistant's text, on which bits per byte are measured.
    """
    writers = {
        split: TokenWriter(folder, split, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) for split in SPLITS
    }
    text_bytes, answer_bytes = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    gzip, gzip_bytes = zlib.compressobj(9, zlib.DEFLATED, 31), 0  # 31: with gzip's header and trailer
    for batch in batches(documents, BATCH):
        words = iter(tokenizer.encode_batch([text for document in batch for text in document.texts]))
        for document in batch:
            split = SPLITS[document.hash <= last_validation]
            if document.roles is None:
                writers[split].add(next(words), document.origin)
            else:
                written = conversation(tokenizer, [(role, next(words).tolist()) for role in document.roles])
                loss_spans = [span for span, learned in zip(written.assistant_spans, document.learned) if learned]
                writers[split].add_whole(np.array(written.ids), loss_spans, document.origin)
            text_bytes[split] += document.size
            answer_bytes[split] += len(document.loss_text)
            if split == "validation":
                gzip_bytes += len(gzip.compress(document.loss_text))
        advance(sum(document.size for document in batch))
    gzip_bytes += len(gzip.flush())
    held_out = answer_bytes["validation"]
    return {
        "gzip_bytes": gzip_bytes if held_out else None,
        "gzip_bpb": 8 * gzip_bytes / held_out if held_out else None,
        "splits": {
            split: {
                "documents": writer.documents,
                "tokens": writer.tokens,
                "text_bytes": text_bytes[split],
                **({"answer_bytes": answer_bytes[split]} if answer_bytes != text_bytes else {}),
            }
            for split, writer in writers.items()
        },
        "files": {name: file for writer in writers.values() for name, file in writer.close().items()},
    }


def batches(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    """Yields lists of documents of at least `size` bytes in total; the last may be smaller."""
    batch: list[Document] = []
    held = 0
    for document in documents:
        batch.append(document)
        held += document.size
        if held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def summary(manifest: dict[str, Any], folder: Path, seconds: float) -> str:
    train, validation = (manifest["splits"][split] for split in SPLITS)
    return (
        f"prepared {train['documents']} training and {validation['documents']} validation documents, "
        f"{(train['text_bytes'] + validation['text_bytes']) / 1e6:.1f} MB, "
        f"{(train['tokens'] + validation['tokens']) / 1e6:.2f} M tokens, in {seconds:.1f} s: {utf8_path(folder)}"
    )
