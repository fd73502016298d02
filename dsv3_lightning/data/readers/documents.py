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
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError

Found = str | list[Message]


def read_rows(path: Path, key: str, where: str, unread: Counter[str]) -> Iterator[Found]:
    """The texts and conversations of a parquet file. unread: counts fields without a meaning. Raises ConfigError."""
    for number, value in enumerate(parquet.rows_of(path, key, where), 1):
        try:
            yield row_of(value, key, unread)
        except ConfigError as error:
            raise ConfigError(f"{where}, row {number}: {error}") from error


def row_of(value: Any, key: str, unread: Counter[str]) -> Found:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list):
        messages = [
            {name: field for name, field in message.items() if field is not None}
            if isinstance(message, dict)
            else message
            for message in value
        ]  # columns that a message lacks are null
        return parse({key: messages}, key, unread)
    raise ConfigError(f"{key}={shown(value)}: must be text, or a list of messages")


def read_pages(path: Path, opened: Callable[[Path], Any]) -> Iterator[str]:
    """The texts of a WARC or WET file."""
    with opened(path) as stream:
        yield from warc.texts_of(stream)


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
