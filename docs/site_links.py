"""Hook of mkdocs: a link out of docs/ must lead to a file of the repository, and the site shows its text alone."""

import re
from pathlib import Path
from typing import Any

OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\((?:\.\./)+([^)#]+)\)")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Raises FileNotFoundError, which ends the build, for a link to a file that isn't there."""
    root = Path(config.docs_dir).parent

    def shown(match: re.Match[str]) -> str:
        if not (root / match[2]).exists():
            raise FileNotFoundError(f"docs/{page.file.src_path} links to {match[2]}")
        return match[1]

    return OUTSIDE.sub(shown, markdown)
