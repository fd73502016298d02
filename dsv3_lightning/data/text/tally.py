"""What reading a corpus met and left out, counted for the manifest and said in lines. Imports no torch."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HIDDEN = "hidden"
SHOWN = 8  # names in one line


@dataclass
class Tally:
    """Counts of what was read, and of what was not.

    documents: read. empty: left out, since there was no text. unlearned: conversations left out, since their marks say
    that nothing of them is learned. replaced: characters by file that stand for bytes that are not UTF-8. skipped: bad
    lines by file (data.skip_bad_lines). unread: fields of conversations, and of their lines, that have no meaning here.
    """

    documents: int = 0
    empty: int = 0
    unlearned: int = 0
    replaced: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)

    def facts(self) -> dict[str, Any]:
        """Its part of the manifest."""
        return {
            "empty_documents": self.empty,
            "unlearned_conversations": self.unlearned,
            "replaced_characters": dict(self.replaced),
            "skipped_lines": dict(self.skipped),
            "unread_fields": dict(self.unread),
        }


def notes(manifest: Mapping[str, Any], files_read: int, left_out: Mapping[str, int]) -> list[str]:
    """Lines on everything that the token files lack of what was given; none where that is nothing.

    left_out: how many files of each suffix were not read, as `find_sources` counts them.
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
    if replaced := manifest["replaced_characters"]:
        lines.append(f"not UTF-8: U+FFFD stands for {sum(replaced.values())} characters: {by_file(replaced)}")
    if unread := manifest["unread_fields"]:
        lines.append(f"fields of conversations that have no meaning here: {listed(unread)}")
    return [f"data.paths: {line}" for line in lines]


def listed(counts: Mapping[str, int]) -> str:
    """The largest counts first.

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
