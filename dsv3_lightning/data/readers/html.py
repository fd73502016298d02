"""The main text of an HTML page, by resiliparse."""

from dsv3_lightning.data.extras import needed

BY = "data.sources, kind html"


def text_of(page: bytes, main_content: bool = True) -> str:
    """The text of a page in any encoding; without menus, headers and footers if `main_content`. Raises ConfigError."""
    encoding = needed("resiliparse.parse.encoding", BY)
    decoded = encoding.bytes_to_str(page, encoding.detect_encoding(page))
    extract = needed("resiliparse.extract.html2text", BY).extract_plain_text
    text: str = extract(decoded, main_content=main_content, preserve_formatting=True, comments=False)
    return text.strip()
