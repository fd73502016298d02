"""What cleaning one dump of Common Crawl takes: core hours and storage by step, from rates in MB/s per core."""

from collections.abc import Mapping
from dataclasses import dataclass

from dsv3_lightning.common.table import si, table

# MB/s per core of UTF-8 text (of HTML for `html`): harmonic means of English, Chinese and code by
# benchmarks/cleaning.py on one core of an AMD EPYC with AVX2, 2026-11-28.
RATES = {
    "html": 33.9,
    "repair": 137.8,
    "language": 8.9,
    "quality": 9.0,
    "pii": 32.9,
    "exact": 111.9,
    "near": 52.4,
    "write": 83.7,
}


@dataclass(frozen=True)
class Dump:
    """A dump. html: bytes of pages as stored in WARC files, uncompressed; compressed: as they are downloaded.

    The defaults are those of April 2024: 2.7 billion pages, 386 TiB.
    """

    pages: float = 2.7e9
    html: float = 386 * 2**40
    compressed: float = 90e12
    text_share: float = 0.09  # of the HTML is main text
    kept_share: float = 0.15  # of the documents, after languages, quality and duplicates (FineWeb)


def hours(dump: Dump, rates: Mapping[str, float]) -> dict[str, float]:
    """Core hours by step. rates: MB/s per core, of HTML for `html`, of text for all other steps.

    >>> hours(Dump(html=3.6e12, text_share=0.1), {"html": 10.0, "near": 20.0})
    {'html': 100.0, 'near': 5.0}
    """
    text = dump.html * dump.text_share
    return {step: (dump.html if step == "html" else text) / 1e6 / rate / 3600 for step, rate in rates.items()}


def storage(dump: Dump, signature_bytes: int = 448 + 16 + 8, ratio: float = 0.35) -> dict[str, float]:
    """Bytes on disk by what they hold. signature_bytes: of a document; ratio: of compressed to plain text."""
    text = dump.html * dump.text_share
    return {
        "WARC files": dump.compressed,
        "text (.jsonl.zst)": text * ratio,
        "signatures": dump.pages * signature_bytes,
        "kept text (.jsonl.zst)": text * dump.kept_share * ratio,
        "tokens, 4 bytes each": text * dump.kept_share,  # 4 bytes of text a token
    }


def shown(dump: Dump, rates: Mapping[str, float]) -> str:
    """Both as a table."""
    found = hours(dump, rates)
    rows = [["step", "MB/s per core", "core hours"]]
    rows += [[step, f"{rates[step]:.1f}", f"{found[step]:,.0f}"] for step in found]
    rows += [["all", "", f"{sum(found.values()):,.0f}"]]
    disk = [["on disk", "size"], *([name, si(size, "B")] for name, size in storage(dump).items())]
    return f"{table(rows)}\n\n{table(disk)}"
