"""The texts of a package's file, without its markup. Files of these packages are trusted: nothing is guessed."""

import gzip
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser

BLOCKS = frozenset(
    "address article blockquote body br dd div dl dt figcaption figure h1 h2 h3 h4 h5 h6 hr li main ol p pre section "
    "table td th title tr ul".split()
)
SKIPPED = frozenset("script style nav header footer aside head noscript button".split())
SKIPPED_CLASSES = frozenset("navheader navfooter docnav toc".split())
EMPTY = frozenset("area base br col embed hr img input link meta source wbr".split())
TERMINAL = re.compile(r"\x1b\[[0-9;]*m")  # colors
ROFF_ESCAPES = (  # of man(7) and groff(7)
    (re.compile(r"\\f(?:\[[^]]*\]|\(..|.)"), ""),
    (re.compile(r"\\[\"#].*"), ""),
    (re.compile(r"\\\(em|\\\[em\]"), "—"),
    (re.compile(r"\\\(rs|\\e"), r"\\"),
    (re.compile(r"\\\*?\(..|\\s[-+]?\d|\\[&/,:%^|!]"), ""),
    (re.compile(r"\\[ ~0]"), " "),
    (re.compile(r"\\([-'`.])"), r"\1"),
)
SILENT = frozenset(
    "TH PD TP PP P LP RS RE IP HP nf fi sp br ad na hy nh ne ft in ti so de ig if ie el ds nr tr".split()
)


def plain(content: bytes) -> list[str]:
    return [content.decode("utf-8", "replace")]


def json_list(content: bytes) -> list[str]:
    return [tidy(text) for text in json.loads(content)]


def fortunes(content: bytes) -> list[str]:
    """The parts between lines of a single %, without terminal colors."""
    return re.split(r"\n%\n", TERMINAL.sub("", content.decode("utf-8", "replace")))


def manual(content: bytes) -> list[str]:
    """The text of a compressed manual page: requests of man(7) are removed, and their words kept."""
    lines = []
    for line in gzip.decompress(content).decode("utf-8", "replace").splitlines():
        if line.startswith((".", "'")):
            name, _, words = line[1:].strip().partition(" ")
            if name.startswith(("\\", '"')) or name in SILENT:
                lines.append("")
                continue
            line = words.replace('"', "")
            if name in ("SH", "SS", "Sh", "Ss"):
                lines.append("")
        for escape, plain_text in ROFF_ESCAPES:
            line = escape.sub(plain_text, line)
        lines.append(line)
    return [tidy("\n".join(lines))]


def html(content: bytes) -> list[str]:
    """The text of a page without navigation, blocks on lines of their own."""
    page = Page()
    page.feed(content.decode("utf-8", "replace"))
    page.close()
    return [tidy("".join(page.parts))]


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skipping: list[str] = []  # the open elements from the first one that is left out
        self.verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes = set((dict(attrs).get("class") or "").split())
        if self.skipping or tag in SKIPPED or classes & SKIPPED_CLASSES:
            self.skipping += [tag] * (tag not in EMPTY)
        self.verbatim += tag == "pre"
        self.end_line(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.skipping:
            del self.skipping[len(self.skipping) - 1 - self.skipping[::-1].index(tag) :]
        self.verbatim -= tag == "pre" and self.verbatim > 0
        if tag not in EMPTY:
            self.end_line(tag)

    def end_line(self, tag: str) -> None:
        if tag in BLOCKS and not self.skipping:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts.append(data if self.verbatim else re.sub(r"\s+", " ", data))


def tidy(text: str) -> str:
    """The text without spaces at the ends of lines and with at most one empty line in a row."""
    text = re.sub(r"[^\S\n]+\n", "\n", text)
    text = re.sub(r"\n[^\S\n]+(?=\S)", lambda found: found[0] if len(found[0]) > 2 else "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


KINDS: dict[str, Callable[[bytes], list[str]]] = {
    "plain": plain, "json_list": json_list, "fortunes": fortunes, "manual": manual, "html": html,
}  # fmt: skip
