"""Cached sha256 digests of large input files, so that a terabyte isn't read at each start. Imports no torch.

A file counts as unchanged if its size, inode, mtime and ctime are the same; no program can set ctime back. Recently
changed files aren't cached, since they could change again within the clock's resolution or by another machine's clock.
"""

import contextlib
import hashlib
import json
import time
from pathlib import Path

from dsv3_lightning.common.files import digest, utf8_path, write_file
from dsv3_lightning.data.text.sources import Source, unreadable
from dsv3_lightning.errors import WriteError

LARGE = 1 << 20  # bytes; smaller files are read in no time
SETTLED = 60.0  # seconds


def described(source: Source, digests: "Digests") -> tuple[str, int, str]:
    """Name, bytes and sha256 of a source's file; of Megatron's token files, both together. Raises ConfigError."""
    data = source.path.with_suffix(".bin")
    files = [source.path, data] if source.kind == "megatron" and data.exists() else [source.path]
    try:
        found = [digests.of(path) for path in files]
        size = sum(path.stat().st_size for path in files)
    except OSError as error:
        raise unreadable(source.where, error) from error
    return source.name, size, found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


class Digests:
    """sha256 digests by file. path: the JSON cache for large files, ignored if it can't be read or written."""

    def __init__(self, path: Path) -> None:
        self.path, self.changed = path, False
        self.known: dict[str, list[int | str]] = {}
        with contextlib.suppress(OSError, ValueError):
            self.known = json.loads(path.read_bytes())

    def of(self, file: Path) -> str:
        """The file's sha256 in hexadecimal. Raises OSError."""
        status = file.stat()  # before reading, so that a change during it is seen next time
        if status.st_size < LARGE:
            return digest(file)
        name = utf8_path(file.resolve())
        marks = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
        *known, sha256 = self.known.get(name, [""])
        if known != marks:
            sha256 = digest(file)
            if time.time() - max(status.st_mtime, status.st_ctime) > SETTLED:
                self.known[name], self.changed = [*marks, sha256], True
        return str(sha256)

    def save(self) -> None:
        """Rewrites the cache. If two processes save at once, the last wins and the other's files are read again."""
        if not self.changed:
            return
        with contextlib.suppress(WriteError):
            write_file(self.path, json.dumps(self.known, indent=0))
