"""Hook of mkdocs that adds every callback of the table to the page about them."""

from typing import Any

from dsv3_lightning.callbacks.settings import CLASSES


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page's text, with a reference to each class on api/callbacks.md."""
    if page.file.src_uri != "api/callbacks.md":
        return markdown
    return markdown + "".join(f"\n::: dsv3_lightning.callbacks.{name}.{kind}\n" for name, kind in CLASSES.items())
