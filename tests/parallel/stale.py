"""The command line on a rank whose view of a folder is old, as a network file system may show it.

python -m tests.parallel.stale RANK FILE ARGUMENTS: on that rank, a checkpoints folder is seen with the names that FILE
lists; FILE is left as it is.
"""

import json
import os
import sys
from pathlib import Path


def see_old_listings(names: list[str]) -> None:
    """What is in a folder `checkpoints` is what the names say, however it is asked for."""
    listed, found, entries, there = os.listdir, Path.glob, os.scandir, Path.exists

    def old(path) -> bool:
        return Path(os.fsdecode(path)).name == "checkpoints" if not isinstance(path, int) else False

    def scandir(path="."):
        all_entries = entries(path)
        return Kept([entry for entry in all_entries if entry.name in names]) if old(path) else all_entries

    def glob(path, pattern, **how):
        return (item for item in found(path, pattern, **how) if not old(path) or item.name in names)

    os.listdir = lambda path=".": [name for name in listed(path) if not old(path) or name in names]
    os.scandir, Path.glob = scandir, glob
    Path.exists = lambda path, **how: there(path, **how) and (not old(path.parent) or path.name in names)


class Kept(list):
    """Directory entries that can be used as `os.scandir`'s."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def close(self):
        pass


if __name__ == "__main__":
    from dsv3_lightning.cli import main

    rank, file, *arguments = sys.argv[1:]
    if os.environ.get("RANK") == rank and Path(file).exists():
        see_old_listings(json.loads(Path(file).read_text()))
    sys.exit(main(arguments))
