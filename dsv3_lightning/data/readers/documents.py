"""The documents of a file by its kind."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from dsv3_lightning.common.json_files import shown
from dsv3_lightning.data.readers import html, megatron, parquet, warc
from dsv3_lightning.data.text.conversation import Message
from dsv3_lightning.data.text.messages import parse
from dsv3_lightning.data.text.sources import Source
from dsv3_lightning.data.text.tally import ReadStats
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.data.text.utf8 import decode
from dsv3_lightning.errors import ConfigError

Found = str | list[Message]


def read_rows(source: Source, key: str, stats: ReadStats, most_bytes: int) -> Iterator[Found]:
    """The texts and conversations of a parquet file; longer texts are left out and counted. Raises ConfigError."""
    for number, value in enumerate(parquet.rows_of(source.path, key, source.where), 1):
        if isinstance(value, bytes):
            if len(value) <= most_bytes:
                yield decode(value, source.shown, stats)
            else:
                stats.too_long[f"{source.shown}, row {number}"] += len(value)
            continue
        try:
            yield row_of(value, key, stats.unread)
        except ConfigError as error:
            raise ConfigError(f"{source.where}, row {number}: {error}") from error


def row_of(value: Any, key: str, unread: Counter[str]) -> Found:
    """A conversation, or the empty text of a row without a value."""
    if value is None:
        return ""
    if isinstance(value, list):
        messages = [
            {name: field for name, field in message.items() if field is not None}
            if isinstance(message, dict)
            else message
            for message in value
        ]  # columns that a message lacks are null
        return parse({key: messages}, key, unread)
    raise ConfigError(f"{key}={shown(value)}: must be text, or a list of messages")


def read_pages(source: Source, opened: Callable[[Path], Any], stats: ReadStats, most_bytes: int) -> Iterator[str]:
    """The texts of a WARC or WET file, of which one record at a time is held."""
    with opened(source.path) as stream:
        yield from warc.texts_of(stream, source.shown, stats, most_bytes)


def read_page(content: bytes) -> Iterator[str]:
    yield html.text_of(content)


def read_tokens(path: Path, tokenizer: str | None, where: str) -> Iterator[str]:
    """The texts of Megatron's token files. Raises ConfigError."""
    if tokenizer is None:
        raise ConfigError(
            f"{where}: token files need the tokenizer that they were made with, as `tokenizer` of the source"
        )
    yield from megatron.documents_of(path, tokenizer_of(tokenizer), where)


@lru_cache(1)
def tokenizer_of(path: str) -> Tokenizer:
    return Tokenizer.from_file(path)
