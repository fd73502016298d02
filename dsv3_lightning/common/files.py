"""Atomic writing of files and folders: a crash or a full disk leaves nothing half-written. Imports no torch."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import TypedDict

from dsv3_lightning.errors import ConfigError, WriteError

BLOCK = 1 << 20
BESIDE, OLD = ".new", ".old"  # name endings of what is being written, and of what it replaces


class FileRecord(TypedDict):
    """A file's entry in a manifest; sha256 in hexadecimal."""

    bytes: int
    sha256: str


def utf8_path(path: str | Path) -> str:
    """The path as text that UTF-8 can encode, with '/' between the parts, for messages and hashes."""
    return os.fsencode(Path(path).as_posix()).decode("utf-8", "replace")


def digest(path: Path) -> str:
    """The sha256 of a file's content in hexadecimal. Raises OSError."""
    sha256 = hashlib.sha256()
    for block in blocks(path):
        sha256.update(block)
    return sha256.hexdigest()


def blocks(path: Path) -> Iterator[bytes]:
    """Yields the file's bytes, a mebibyte at a time."""
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            yield block


def write_file(path: Path, content: str | bytes) -> FileRecord:
    """Writes a file atomically; text is UTF-8. An existing device, pipe or link is written to instead of replaced.

    Raises WriteError.
    """
    data = content.encode() if isinstance(content, str) else content
    if path.is_symlink() and path.exists() or not (path.is_file() or path.is_dir()) and path.exists():
        try:
            path.write_bytes(data)
        except OSError as error:
            raise WriteError(path, reason_of(error)) from error
    else:
        with whole(path) as beside:
            beside.write_bytes(data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a path to write a file or folder to, which is synced and renamed to `path` when the block ends.

    Readers see either the old one or the new one, even after a crash. Files get the umask's mode. The yielded path is
    in a private folder next to `path`: an error leaves nothing behind, a kill what `remove_leftovers` removes.
    Raises WriteError with the path and the system's reason.
    """
    own = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.name[:40]}."
        own = TemporaryDirectory(prefix=prefix, suffix=BESIDE, dir=path.parent, ignore_cleanup_errors=True)
        beside = Path(own.name) / path.name
        yield beside
        sync_all(beside)
        put_in_place(beside, path, Path(own.name, OLD))
    except WriteError as error:
        inside = own is not None and Path(own.name) in Path(str(error.path)).parents
        raise WriteError(path, error.reason) if inside else error from error.__cause__
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError
        if (failed := os_error(error)) is None:
            raise
        raise WriteError(path, reason_of(failed)) from error
    finally:
        if own is not None:
            own.cleanup()


def give_name(path: Path, name: Path) -> None:
    """Gives a file or folder a second name, which remains when the first is removed; a copy where links are impossible.

    Raises WriteError.
    """
    with whole(name) as beside:
        if is_folder(path):
            shutil.copytree(path, beside, copy_function=link_or_copy)
        else:
            link_or_copy(path, beside)


def link_or_copy(path: str | Path, name: str | Path) -> None:
    """Makes a hard link, or, on file systems that have none, a copy. Raises OSError."""
    try:
        os.link(path, name)
    except OSError:
        shutil.copyfile(path, name)


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Removes what `whole` leaves in the folder if its process is killed; nobody else may be writing there.

    name: how the files' names begin.
    """
    for path in folder.glob(f".{name}*{BESIDE}"):
        remove(path)


def os_error(error: BaseException | None) -> OSError | None:
    """The operating system's error at the root of an exception's chain, or None."""
    found = None
    while error is not None:
        found = error if isinstance(error, OSError) else found
        error = error.__cause__ or error.__context__
    return found


def reason_of(error: OSError) -> str:
    return error.strerror or " ".join(str(error).split()) or type(error).__name__


def sync_all(path: Path) -> None:
    """Syncs a file, or a folder with its content, to disk, and sets the umask's modes."""
    inside = [*path.rglob("*"), path] if is_folder(path) else [path]
    mode = 0o666 & ~umask()
    for item in inside:
        if is_folder(item):
            sync_folder(item)
        elif item.is_file() and not item.is_symlink():
            if item.stat().st_mode & 0o777 != mode:  # some libraries create files that only the owner can read
                item.chmod(mode)
            with open(item, "rb") as file:
                os.fsync(file.fileno())


def umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def put_in_place(beside: Path, path: Path, aside: Path | None = None) -> None:
    """Renames what was written to its final name and syncs the folder. Raises OSError.

    A rename can't replace a folder, or a file by a folder, so the old one is first renamed to `aside`, a name that no
    one else may use; by default the same name with OLD.
    """
    old = aside or path.with_name(path.name + OLD)
    if path.exists() and (is_folder(path) or is_folder(beside)):
        remove(old)
        os.replace(path, old)
    os.replace(beside, path)
    sync_folder(path.parent)
    remove(old)


def is_folder(path: Path) -> bool:
    """Whether the path is a folder and not a link to one."""
    return path.is_dir() and not path.is_symlink()


def remove(path: Path) -> None:
    """Removes a file, or a folder with its content, if it exists."""
    if is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_folder(flag: str, path: Path) -> None:
    """Creates a folder and its parents if missing, before long work that writes to it. Raises ConfigError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):  # an existing folder may be read-only
            pass
    except OSError as error:
        raise ConfigError(f"{flag} {path}: must be a folder that can be written to ({error.strerror})") from error


def sync_folder(folder: Path) -> None:
    """Syncs the folder's entries (new files, renames) to survive a power failure; does nothing on Windows."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
