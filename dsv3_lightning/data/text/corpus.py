"""The documents of a corpus: text files and jsonl, read as UTF-8 whatever the locale. Imports no torch.

A document is a text, or a conversation: a jsonl line whose field `text_key` holds a list of messages.
"""

import gzip
import importlib
import itertools
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import zstandard

from dsv3_lightning.common.files import BLOCK, blocks, utf8_path
from dsv3_lightning.common.json_files import shown
from dsv3_lightning.data.config import DEFAULTS
from dsv3_lightning.data.readers.documents import read_page, read_pages, read_rows, read_tokens
from dsv3_lightning.data.text.conversation import Message
from dsv3_lightning.data.text.messages import holds_messages, parse
from dsv3_lightning.data.text.sources import LINE_SUFFIXES, Source, unreadable
from dsv3_lightning.data.text.tally import ReadStats
from dsv3_lightning.data.text.utf8 import decode, whole
from dsv3_lightning.errors import ConfigError

orjson: Any = importlib.import_module("orjson") if find_spec("orjson") else None  # of the extra `data`

BOM = b"\xef\xbb\xbf"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
ZST_PIECE = 1 << 13  # bytes decompressed at a time: at the best ratio they become a quarter of a gigabyte
CONVERSATION_BEGINS = ("", "[", "{")  # of texts that may be conversations as JSON, and the empty one
MOST_BAD_LINES = 10  # named in one message
CONVERSATIONS = ("messages", "conversations")  # the usual names of their field


class TooLong(NamedTuple):
    """In place of a line of so many bytes that it isn't held in memory."""

    size: int


def read_documents(
    sources: Sequence[Source],
    text_key: str,
    stats: ReadStats | None = None,
    skip_bad_lines: bool = False,
    most_bytes: int = DEFAULTS["max_document_bytes"],
) -> Iterator[str | list[Message]]:
    """Yields documents, one per file or jsonl line, never empty. Keeps line ends and removes a byte order mark.

    skip_bad_lines: skip and count unusable lines. most_bytes: of a line or a file of text; larger ones are left out and
    counted. Raises ConfigError that names the file, and the numbers of its bad
    lines, if something can't be read.
    """
    stats = stats if stats is not None else ReadStats()
    for source in sources:
        lines = source.kind == "jsonl" or source.kind is None and source.path.name.lower().endswith(LINE_SUFFIXES)
        key = source.text_key or text_key
        try:
            most = most_bytes if source.marks is None else sys.maxsize  # which are numbered by all documents
            if (other := read_other(source, key, stats, most)) is not None:
                found = other
            elif lines:
                found = read_lines(source, key, stats, skip_bad_lines, most)
            else:
                found = read_text(source, stats, most)
            if source.marks is not None:
                found = itertools.compress(found, np.load(source.marks) == 0)
            for document in found:
                if not document:
                    stats.empty += 1
                elif isinstance(document, list) and not any(message.learned for message in document):
                    stats.unlearned += 1
                else:
                    stats.documents += 1
                    yield document
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            raise unreadable(source.where, error) from error


def read_other(source: Source, key: str, stats: ReadStats, most_bytes: int) -> Iterator[str | list[Message]] | None:
    """The documents of a kind that isn't text or jsonl; None for those."""
    if source.kind == "parquet":
        return read_rows(source, key, stats, most_bytes)
    if source.kind == "warc":
        return read_pages(source, opened, stats, most_bytes)
    if source.kind == "html":
        page = content_within(source, stats, most_bytes)
        return iter(()) if page is None else read_page(page)
    if source.kind == "megatron":
        return read_tokens(source.path, source.tokenizer, source.where)
    return None


def content_within(source: Source, stats: ReadStats, most_bytes: int) -> bytes | None:
    """The content of a file; None if it has more bytes, of which no more are held, and which are counted."""
    parts, size = [], 0
    for block in content_of(source.path):
        size += len(block)
        if size <= most_bytes:
            parts.append(block)
        else:  # counts the rest
            parts.clear()
    if size > most_bytes:
        stats.too_long[source.shown] += size
        return None
    return b"".join(parts)


def read_text(source: Source, stats: ReadStats, most_bytes: int) -> Iterator[str]:
    content = content_within(source, stats, most_bytes)
    if content is None:
        return
    content = content.removeprefix(BOM)
    where = source.where
    refuse_no_text(where, content)
    text = decode(content, source.shown, stats)
    begun = text.lstrip()
    if holds_messages(begun) or holds_messages(begun[: begun.find("\n")]):  # one JSON document, or one per line
        raise ConfigError(
            f"{where}: holds conversations as JSON, which would be learned as they are spelled; write one a line into "
            "a file named .jsonl, and name their field by data.text_key"
        )
    yield text


def refuse_no_text(where: str, content: bytes) -> None:
    """Raises ConfigError for a file that only has the name of a text file."""
    if content.startswith(LFS_POINTER):
        raise ConfigError(f"{where}: is a pointer of Git LFS in place of the file; `git lfs pull` fetches it")
    if content.startswith(UTF_16):
        raise ConfigError(f"{where}: is UTF-16, must be UTF-8; iconv -f UTF-16 -t UTF-8 converts it")
    if b"\0" in content:
        raise ConfigError(f"{where}: is a binary file (it holds NUL bytes), must be text")


class BadLines:
    """The lines of a file that can't be used, by reason: reported together, not one per start."""

    def __init__(self, source: Source) -> None:
        self.source, self.numbers, self.count = source, dict[str, list[int]](), 0

    def add(self, number: int, reason: str) -> None:
        self.numbers.setdefault(reason, []).append(number)
        self.count += 1

    def error(self) -> ConfigError:
        bad = [
            f"{'line' if len(numbers) == 1 else 'lines'} {', '.join(map(str, numbers))}: {reason}"
            for reason, numbers in self.numbers.items()
        ]
        more = " (the rest of the file was not read)" if self.count >= MOST_BAD_LINES else ""
        return ConfigError(
            f"{self.source.where}, {'; '.join(bad)}{more}; data.skip_bad_lines=true leaves bad lines out"
        )


def read_lines(
    source: Source, text_key: str, stats: ReadStats, skip_bad_lines: bool, most_bytes: int
) -> Iterator[str | list[Message]]:
    bad, first = BadLines(source), True
    for number, line in enumerate(lines_of(source.path, most_bytes, source.begin, source.end), 1):
        if isinstance(line, TooLong):
            stats.too_long[f"{source.shown}, line {lines_before(source) + number}"] += line.size
            continue
        line = line.removeprefix(BOM) if number == 1 and not source.begin else line
        if not line.strip():
            continue
        if first and not source.begin:
            refuse_other_layouts(source, line)
        first = False
        try:
            document: str | list[Message]
            if (text := plain_text(line, text_key)) is not None:
                document = text
            else:
                document = parse_line(decode(line, source.shown, stats), text_key, source.shown, stats)
        except ConfigError as error:
            bad.add(lines_before(source) + number, str(error))
            if skip_bad_lines:
                stats.skipped[source.shown] += 1
            elif bad.count == MOST_BAD_LINES:
                raise bad.error() from None
            continue
        yield document
    if bad.count and not skip_bad_lines:
        raise bad.error()


def plain_text(line: bytes, text_key: str) -> str | None:
    """The text of a line without anything unusual, by orjson if it is installed; None: `parse_line` reads the line.

    It is None for conversations, invalid UTF-8, lone surrogates and whatever isn't JSON, which orjson refuses.
    """
    if orjson is None:
        return None
    try:
        record = orjson.loads(line)
    except ValueError:
        return None
    text = record.get(text_key) if isinstance(record, dict) else None
    return text if isinstance(text, str) and text[:1] not in CONVERSATION_BEGINS and not text[:1].isspace() else None


def lines_before(source: Source) -> int:
    """The number of the file's lines before those of this part."""
    if not source.begin:
        return 0
    with open(source.path, "rb") as file:
        start = first_line(file, source.begin, source.end) or 0
    left, count = start, 0
    for block in blocks(source.path):
        count += block[:left].count(b"\n")
        left -= len(block)
        if left <= 0:
            break
    return count


def refuse_other_layouts(source: Source, line: bytes) -> None:
    """Raises ConfigError if the first line looks like another kind of file."""
    where, start = source.where, line.strip()
    refuse_no_text(where, line)
    if start.startswith(b"["):
        name = utf8_path(source.path.name)
        raise ConfigError(f"{where}: is a JSON array, not JSON lines; jq -c '.[]' {name} writes one object per line")
    if start == b"{":
        raise ConfigError(
            f"{where}: is a JSON document over several lines, not JSON lines; jq -c . writes each object on one line"
        )


def parse_line(line: str, text_key: str, file: str, stats: ReadStats) -> str | list[Message]:
    """The text of a line, which may be empty, or its conversation. Raises ConfigError without file and line."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        comma = ", as a comma follows the object" if line.rstrip().endswith("},") else ""
        raise ConfigError(f"not JSON: {error.msg} at character {error.pos + 1}{comma}") from None
    except (ValueError, RecursionError) as error:  # too many digits, nested too deep
        raise ConfigError(f"not JSON: {error}") from None
    if not isinstance(record, dict) or text_key not in record:
        found = ", ".join(record) if isinstance(record, dict) else f"not an object but {shown(record)}"
        raise ConfigError(
            f"no text under data.text_key={text_key}, nor a list of messages; the line has {found or 'no keys'}"
            f"{advice(record)}"
        )
    text = record[text_key]
    if text is None:
        return ""
    if isinstance(text, str):
        text = whole(text, file, stats)
        if holds_messages(text):
            raise ConfigError(f"{text_key}: is a conversation as JSON text; must be the list itself")
        return text
    if isinstance(text, list):
        messages = parse(record, text_key, stats.unread)
        return [message._replace(text=whole(message.text, file, stats)) for message in messages]
    raise ConfigError(f"{text_key}={shown(text)}: must be text, or a list of messages")


def advice(record: Any) -> str:
    """A hint if the line looks like one for another `data.text_key`, else an empty string."""
    if not isinstance(record, dict):
        return ""
    for name in CONVERSATIONS:
        if isinstance(record.get(name), list):
            return f"; data.text_key={name} reads its conversation"
    return "; data.text_key=text reads its text" if isinstance(record.get("text"), str) else ""


def lines_of(
    path: Path, most_bytes: int = DEFAULTS["max_document_bytes"], begin: int = 0, end: int | None = None
) -> Iterator[bytes | TooLong]:
    """The lines of a plain, gzip or zstandard file, without their newlines.

    begin, end: of a plain file, the lines that begin in these bytes.
    """
    if begin == 0 and end is None:
        yield from split_lines(content_of(path), most_bytes)
        return
    with open(path, "rb") as file:
        place = first_line(file, begin, end)
        if place is None:
            return
        file.seek(place)
        for line in split_lines(iter(lambda: file.read(BLOCK), b""), most_bytes):
            if end is not None and place >= end:
                return
            place += 1 + (line.size if isinstance(line, TooLong) else len(line))
            yield line


def first_line(file: BinaryIO, begin: int, end: int | None) -> int | None:
    """Where the first line begins at or after `begin`; None if that isn't before `end`."""
    if begin == 0:
        return 0
    place = begin - 1
    file.seek(place)
    while (end is None or place < end) and (block := file.read(BLOCK)):
        if (found := block.find(b"\n")) >= 0:
            place += found + 1
            return place if end is None or place < end else None
        place += len(block)
    return None


def content_of(path: Path) -> Iterator[bytes]:
    """Yields the decompressed content of a plain, gzip or zstandard file in pieces."""
    if path.name.lower().endswith(".zst"):
        yield from zstandard_blocks(path)
    else:
        with opened(path) as stream:
            while block := stream.read(BLOCK):
                yield block


def opened(path: Path) -> Any:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")


def zstandard_blocks(path: Path) -> Iterator[bytes]:
    """Yields the content of all frames. Raises EOFError for a truncated file, which the library's reader accepts."""
    frame = None
    pieces = (block[begin : begin + ZST_PIECE] for block in blocks(path) for begin in range(0, len(block), ZST_PIECE))
    for block in pieces:
        while block:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            yield frame.decompress(block)
            block = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("compressed file ended before its end-of-stream marker was reached")


def split_lines(chunks: Iterator[bytes], most_bytes: int) -> Iterator[bytes | TooLong]:
    """Yields lines without their newline, in linear time even for a line that spans thousands of chunks.

    No more than `most_bytes` of a line are held; longer ones are only counted.
    """
    rest: list[bytes] = []
    size = 0
    for chunk in chunks:
        for number, line in enumerate(chunk.split(b"\n")):
            if number:  # the end of the one before
                yield b"".join(rest) if size <= most_bytes else TooLong(size)
                rest, size = [], 0
            size += len(line)
            if size <= most_bytes:
                rest.append(line)
            else:
                rest.clear()
    yield b"".join(rest) if size <= most_bytes else TooLong(size)
