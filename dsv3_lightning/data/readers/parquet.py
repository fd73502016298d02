"""Texts and conversations of parquet files, one row each."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv3_lightning.data.extras import needed
from dsv3_lightning.errors import ConfigError

BY = "data.sources, kind parquet"
ROWS = 1000  # that are held in memory


def rows_of(path: Path, column: str, where: str) -> Iterator[Any]:
    """Yields the values of a column: bytes of texts, None, or lists of messages. where: setting and file, for messages.

    Raises ConfigError for a file that can't be read or has no such column.
    """
    pyarrow = needed("pyarrow", BY)
    parquet = needed("pyarrow.parquet", BY)
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if column not in schema.names:
                raise ConfigError(f"{where}: no column {column}; it has {', '.join(schema.names)}; set text_key")
            kind = schema.field(column).type
            types = pyarrow.types
            held = kind.value_type if types.is_dictionary(kind) else kind
            is_text = types.is_string(held) or types.is_large_string(held)
            if not is_text and not types.is_list(kind):
                raise ConfigError(f"{where}: column {column} holds {kind}; must be text, or a list of messages")
            for batch in file.iter_batches(ROWS, columns=[column]):
                values = batch.column(0)  # pyarrow doesn't check that texts are UTF-8
                yield from (values.cast(held).cast(pyarrow.large_binary()) if is_text else values).to_pylist()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: column {column} holds a message that isn't UTF-8 ({error.reason})") from error
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from error
