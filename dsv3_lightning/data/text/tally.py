"""Statistics of reading a corpus, for the manifest and for messages. Imports no torch."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HIDDEN = "hidden"
SHOWN = 8  # names in one line


@dataclass
class ReadStats:
    """Counts of what was read and what was left out.

    documents: those read. empty: documents without text. unlearned: conversations whose fields exclude everything from
    training. replaced: characters by file that replace invalid UTF-8. skipped: bad lines by file
    (data.skip_bad_lines). too_long: bytes by file, or by file and line, that are above data.max_document_bytes.
    unread: fields of conversations and of their lines without a meaning for training.
    """

    documents: int = 0
    empty: int = 0
    unlearned: int = 0
    replaced: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    too_long: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)

    def facts(self) -> dict[str, Any]:
        """The counts as they appear in the manifest."""
        return {
            "empty_documents": self.empty,
            "unlearned_conversations": self.unlearned,
            "replaced_characters": dict(self.replaced),
            "skipped_lines": dict(self.skipped),
            "too_long": dict(self.too_long),
            "unread_fields": dict(self.unread),
        }


def notes(
    manifest: Mapping[str, Any], files_read: int, left_out: Mapping[str, int], setting: str = "data.paths"
) -> list[str]:
    """Messages about all input that is not in the token files; empty if all of it is.

    left_out: number of unread files by suffix, as counted by `find_sources`. setting: the one that names the files.
    """
    lines = []
    if left_out:
        hidden = left_out.get(HIDDEN, 0)
        others = {label: number for label, number in left_out.items() if label != HIDDEN}
        found = f"read {files_read} of {files_read + sum(others.values())} files"
        parts = [f"not read: {listed(others)}"] if others else []
        parts += [f"{hidden} hidden files or folders left out"] if hidden else []
        lines.append("; ".join([found, *parts]))
    if empty := manifest["empty_documents"]:
        lines.append(f"left out: {empty} {'document' if empty == 1 else 'documents'} without text")
    if unlearned := manifest["unlearned_conversations"]:
        lines.append(f"left out: {unlearned} conversations of which, by their own marks, nothing is learned")
    if skipped := manifest["skipped_lines"]:
        lines.append(f"left out (data.skip_bad_lines): {sum(skipped.values())} bad lines: {by_file(skipped)}")
    if long := manifest.get("too_long"):  # absent from older manifests
        shown = [f"{name} ({size / 1e6:,.1f} MB)" for name, size in list(long.items())[:SHOWN]]
        more = [f"{len(long) - SHOWN} others"] if len(long) > SHOWN else []
        lines.append(f"left out (data.max_document_bytes): {len(long)} too long: {'; '.join([*shown, *more])}")
    if replaced := manifest["replaced_characters"]:
        lines.append(f"not UTF-8: U+FFFD stands for {sum(replaced.values())} characters: {by_file(replaced)}")
    if unread := manifest["unread_fields"]:
        lines.append(f"fields of conversations that have no meaning here: {listed(unread)}")
    return [f"{setting}: {line}" for line in lines]


def listed(counts: Mapping[str, int]) -> str:
    """The counts with their names, largest first.

    >>> listed({".csv": 1, ".json.gz": 3})
    '3 .json.gz, 1 .csv'
    """
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    more = [f"{sum(number for _, number in ordered[SHOWN:])} others"] if len(ordered) > SHOWN else []
    return ", ".join([*(f"{number} {label}" for label, number in ordered[:SHOWN]), *more])


def by_file(counts: Mapping[str, int]) -> str:
    """
    >>> by_file({"a.txt": 2})
    '2 in a.txt'
    """
    return listed({f"in {file}": number for file, number in counts.items()})
