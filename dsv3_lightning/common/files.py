"""Files under any locale, written so that a crash leaves nothing half-done. Imports no torch."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from tokenize import TokenError
from typing import TypedDict

import numpy as np

from dsv3_lightning.errors import ConfigError

BLOCK = 1 << 20


class FileRecord(TypedDict):
    """What a manifest says of a file; sha256 in hexadecimal."""

    bytes: int
    sha256: str


def readable(path: str | Path) -> str:
    """The path as text that UTF-8 can hold, for messages and hashes; '/' between the parts."""
    return os.fsencode(Path(path).as_posix()).decode("utf-8", "replace")


def digest(path: Path) -> str:
    """sha256 of a file's content, hexadecimal. Raises OSError."""
    sha256 = hashlib.sha256()
    for block in blocks(path):
        sha256.update(block)
    return sha256.hexdigest()


def blocks(path: Path) -> Iterator[bytes]:
    """The file's bytes, a mebibyte at a time."""
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            yield block


def write_synced(path: Path, content: bytes) -> FileRecord:
    """Writes the file through to the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write_whole(path: Path, text: str) -> None:
    """Writes beside and renames."""
    beside = path.with_name(path.name + ".new")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def put_in_place(beside: Path, path: Path) -> None:
    """What was written beside gets its name, through to the disk. Where a folder has that name, or shall get it, no
    rename replaces the old one: it goes out of the way first."""
    old = path.with_name(path.name + ".old")
    if path.exists() and (path.is_dir() or beside.is_dir()):
        remove(old)
        os.replace(path, old)
    os.replace(beside, path)
    sync_folder(path.parent)
    remove(old)


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_folder(flag: str, path: Path) -> None:
    """With its parents, if it isn't there; called before long work whose result goes there. Raises ConfigError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # a folder that is there may be read-only
            pass
    except OSError as error:
        raise ConfigError(f"{flag} {path}: must be a folder that can be written to ({error.strerror})") from error


def read_numbers(flag: str, path: Path) -> np.ndarray:
    """The array of an .npy file. Raises ConfigError."""
    try:
        with open(path, "rb") as file:  # np.load would also take .npz files and pickles
            array = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, SyntaxError, TokenError) as error:  # a header is Python code
        raise ConfigError(f"{flag} {path}: not a readable .npy file ({error})") from error
    if array.dtype.kind not in "iuf":
        raise ConfigError(f"{flag} {path}: must hold whole or real numbers, holds {array.dtype}")
    return array


def sync_folder(folder: Path) -> None:
    """Makes the folder's entries (new files, a rename) survive a power cut; does nothing on Windows."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
