"""Texts and conversations of parquet files, one row each."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv3_lightning.data.extras import needed
from dsv3_lightning.errors import ConfigError

BY = "data.sources, kind parquet"
ROWS = 1000  # that are held in memory


def rows_of(path: Path, column: str, where: str) -> Iterator[Any]:
    """Yields the values of a column: texts, None, or lists of messages. where: setting and file, for messages.

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
            if not (types.is_string(kind) or types.is_large_string(kind) or types.is_list(kind)):
                raise ConfigError(f"{where}: column {column} holds {kind}; must be text, or a list of messages")
            for batch in file.iter_batches(ROWS, columns=[column]):
                yield from batch.column(0).to_pylist()
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from error
