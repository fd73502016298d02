"""Repair of damaged Unicode. Text without a sign of damage is left unchanged, to the byte.

Signs are control characters, sequences that UTF-8 read as Latin-1 or Windows-1252 leaves ("mojibake"), and letters with
separate accents where Unicode has one character. ftfy repairs them; quotes, full-width characters, ligatures, HTML
entities and line ends stay as written.
"""

import re
import unicodedata
from functools import cache
from typing import Any

from dsv3_lightning.data.extras import needed

CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufeff\ufff9-\uffff]")
# A lead byte of UTF-8 as Latin-1 shows it, before a byte from 0x80 to 0xBF as Windows-1252 or Latin-1 show it.
MOJIBAKE = re.compile(
    "[\xc2-\xf4][\x80-\xbf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]"
)


def is_suspect(text: str) -> bool:
    """Whether the text shows a sign of damage.

    >>> is_suspect("“引号”，ＡＢＣ &lt;b&gt; ﬁ é"), is_suspect("cafÃ©"), is_suspect("e\\u0301")
    (False, True, True)
    """
    if CONTROLS.search(text):
        return True
    return not text.isascii() and (MOJIBAKE.search(text) is not None or not unicodedata.is_normalized("NFC", text))


def repair(text: str) -> str:
    """The text, repaired if it shows a sign of damage. Raises ConfigError without ftfy."""
    if not is_suspect(text):
        return text
    fixed: str = needed("ftfy", "data.cleaning.repair").fix_text(text, settings())
    return unicodedata.normalize("NFC", fixed)


@cache
def settings() -> Any:
    return needed("ftfy", "data.cleaning.repair").TextFixerConfig(
        unescape_html=False,
        normalization=None,
        uncurl_quotes=False,
        fix_character_width=False,
        fix_latin_ligatures=False,
        fix_line_breaks=False,
        explain=False,
    )
