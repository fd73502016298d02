"""Pages of WARC files, as their main text, and the texts of WET files, as Common Crawl has them."""

from collections.abc import Iterator
from typing import Any

from dsv3_lightning.data.extras import needed
from dsv3_lightning.data.readers.html import text_of
from dsv3_lightning.data.text.tally import ReadStats
from dsv3_lightning.data.text.utf8 import decode

BY = "data.sources, kind warc"
HTML = ("text/html", "application/xhtml+xml")


def texts_of(stream: Any, file: str, stats: ReadStats, most_bytes: int) -> Iterator[str]:
    """Yields the text of every HTML response and of every conversion record.

    stream: decompressed bytes. file: for counts. most_bytes: of a record; larger ones are left out and counted. Raises
    EOFError for a record that is cut off, and ConfigError without the packages.
    """
    warc = needed("fastwarc.warc", BY)
    wanted = warc.WarcRecordType.response | warc.WarcRecordType.conversion
    for record in warc.ArchiveIterator(stream, record_types=wanted):
        text = record.record_type == warc.WarcRecordType.conversion
        if not text and record.http_content_type not in HTML:
            continue
        size = record.content_length
        if size > most_bytes:
            stats.too_long[f"{file}, record {record.record_id}"] += size
            continue
        content = record.reader.read()
        if len(content) < size:
            raise EOFError(f"record {record.record_id} has {len(content)} of its {size} bytes")
        yield decode(content, file, stats).strip() if text else text_of(content)
