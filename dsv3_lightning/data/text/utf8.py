"""Text from bytes that may be no UTF-8, and from JSON that may hold what UTF-8 can't encode. Imports no torch."""

import re

from dsv3_lightning.data.text.tally import ReadStats

SURROGATES = re.compile("[\ud800-\udfff]")
REPLACEMENT = "\ufffd"


def decode(data: bytes, file: str, stats: ReadStats) -> str:
    """Decodes UTF-8, with U+FFFD for invalid bytes, which are counted by file."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        text = data.decode(errors="replace")
        stats.replaced[file] += text.count(REPLACEMENT) - data.count(REPLACEMENT.encode())
        return text


def whole(text: str, file: str, stats: ReadStats) -> str:
    """Replaces lone surrogates, which JSON can escape (\\ud83d) but UTF-8 can't encode."""
    if text.isascii():
        return text
    text, number = SURROGATES.subn(REPLACEMENT, text)
    if number:
        stats.replaced[file] += number
    return text
