"""What is in large input files, remembered: a terabyte isn't read at each start to find it as it was. Imports no torch.

A file counts as unchanged while its size, its inode and the times of its last changes are the same; the time of the
inode's change is the system's, no program can set it back. What changed a moment ago isn't remembered: it could change
again within the clock's tick, or by the clock of another machine.
"""

import contextlib
import json
import time
from pathlib import Path

from dsv3_lightning.common.files import digest, readable, write_file
from dsv3_lightning.errors import WriteError

LARGE = 1 << 20  # bytes; smaller files are read in no time
SETTLED = 60.0  # seconds


class Digests:
    """sha256 by file. path: where those of large files are kept, JSON; one that can't be read or written isn't used."""

    def __init__(self, path: Path) -> None:
        self.path, self.changed = path, False
        self.known: dict[str, list[int | str]] = {}
        with contextlib.suppress(OSError, ValueError):
            self.known = json.loads(path.read_bytes())

    def of(self, file: Path) -> str:
        """Hexadecimal. Raises OSError."""
        status = file.stat()  # before it is read: a change meanwhile is seen the next time
        if status.st_size < LARGE:
            return digest(file)
        name = readable(file.resolve())
        marks = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
        *known, sha256 = self.known.get(name, [""])
        if known != marks:
            sha256 = digest(file)
            if time.time() - max(status.st_mtime, status.st_ctime) > SETTLED:
                self.known[name], self.changed = [*marks, sha256], True
        return str(sha256)

    def save(self) -> None:
        """The whole file anew. Of two processes at the same time the last one's stays; the other's is read again."""
        if not self.changed:
            return
        with contextlib.suppress(WriteError):
            write_file(self.path, json.dumps(self.known, indent=0))
