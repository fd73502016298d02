"""Pages of WARC files, as their main text, and the texts of WET files, as Common Crawl has them."""

from collections.abc import Iterator
from typing import Any

from dsv3_lightning.data.extras import needed
from dsv3_lightning.data.readers.html import text_of

BY = "data.sources, kind warc"
HTML = ("text/html", "application/xhtml+xml")


def texts_of(stream: Any) -> Iterator[str]:
    """Yields the text of every HTML response and of every conversion record. stream: decompressed bytes.

    Raises ConfigError without the packages.
    """
    warc = needed("fastwarc.warc", BY)
    wanted = warc.WarcRecordType.response | warc.WarcRecordType.conversion
    for record in warc.ArchiveIterator(stream, record_types=wanted):
        if record.record_type == warc.WarcRecordType.conversion:
            yield record.reader.read().decode("utf-8", "replace").strip()
        elif record.http_content_type in HTML:
            yield text_of(record.reader.read())
