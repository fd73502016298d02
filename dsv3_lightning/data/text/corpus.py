"""The documents of a corpus: text files, folders and jsonl, read as UTF-8 whatever the locale. Imports no torch.

A document is a text, or a conversation: a jsonl line whose field `text_key` holds a list of messages.
"""

import gzip
import importlib.util
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import zstandard

from dsv3_lightning.common.files import blocks, readable
from dsv3_lightning.common.paths import user_path
from dsv3_lightning.data.config import PACKAGE
from dsv3_lightning.data.text.conversation import Message, parse
from dsv3_lightning.errors import ConfigError

TEXT_SUFFIXES = (".txt", ".md", ".py")
LINE_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
BOM = b"\xef\xbb\xbf"
# Left out of the standard library and of packages: Debian packs the tests apart, so that corpora would differ, and
# other people's code. Tables that a program wrote (character sets, the text of help()) are a sixth of the library's
# bytes and a third of its tokens.
LEFT_OUT_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)


class Source(NamedTuple):
    """One file. `name` tells it apart wherever the corpus lies: the path below the folder that was given.

    origin: where its text is from, for measures by origin: the path that was given, or where that is a single folder
    (or the standard library), the first folder below it.
    """

    name: str
    path: Path
    origin: str = ""


@dataclass
class Tally:
    """What reading met: documents, empty ones (left out), and ones whose bytes were not UTF-8 (U+FFFD put there)."""

    documents: int = 0
    empty: int = 0
    repaired: int = 0


def find_sources(paths: Sequence[str]) -> list[Source]:
    """The files of `DataConfig.paths` in the order given, folders sorted by path; [] is the standard library, and
    package:NAME the Python files of an installed package.

    Raises ConfigError for a path that doesn't exist, a suffix that isn't read, and a folder without any text.
    """
    if not paths:
        return by_folder(walk(Path(sysconfig.get_paths()["stdlib"]), (".py",), LEFT_OUT_FOLDERS))
    sources: list[Source] = []
    for given in paths:
        if given.startswith(PACKAGE):
            found = walk(package_folder(given), (".py",), LEFT_OUT_FOLDERS)
            sources += [source._replace(origin=given) for source in found]
            continue
        path = user_path(given)
        if not path.exists():
            raise ConfigError(f"data.paths: {given} does not exist")
        if path.is_dir():
            found = walk(path, TEXT_SUFFIXES + LINE_SUFFIXES)
        else:
            found = [Source(readable(path.name), path)] if path.name.endswith(TEXT_SUFFIXES + LINE_SUFFIXES) else []
        if not found:
            raise ConfigError(f"data.paths: {given} is no text; read are {' '.join(TEXT_SUFFIXES + LINE_SUFFIXES)}")
        sources += [source._replace(origin=readable(path.name)) for source in found]
    single = len(paths) == 1 and (paths[0].startswith(PACKAGE) or user_path(paths[0]).is_dir())
    return by_folder(sources) if single else sources


def package_folder(given: str) -> Path:
    """Where the installed package of `package:NAME` lies; it isn't imported. Raises ConfigError."""
    name = given.removeprefix(PACKAGE)
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"data.paths: {given} is not installed, or no package with a folder of its own")
    return Path(spec.submodule_search_locations[0])


def by_folder(sources: list[Source]) -> list[Source]:
    return [source._replace(origin=first_folder(source.name)) for source in sources]


def first_folder(name: str) -> str:
    """The first folder of a relative path.

    >>> first_folder("json/decoder.py"), first_folder("ast.py")
    ('json', '(top level)')
    """
    return name.split("/", 1)[0] if "/" in name else "(top level)"


def main_origins(sources: Sequence[Source], limit: int = 16) -> dict[str, str]:
    """Each origin's own name, or `others` for all but the `limit - 1` with the largest files, where there are more."""
    sizes: dict[str, int] = {}
    for source in sources:
        sizes[source.origin] = sizes.get(source.origin, 0) + source.path.stat().st_size
    largest = sorted(sizes, key=lambda origin: (-sizes[origin], origin))
    kept = largest if len(largest) <= limit else largest[: limit - 1]
    return {origin: origin if origin in kept else "others" for origin in largest}


def walk(folder: Path, suffixes: tuple[str, ...], leave_out: frozenset[str] = frozenset()) -> list[Source]:
    """Files below the folder, by relative path. Leaves out what is hidden, and links to folders."""
    found = []
    for root, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in leave_out]
        for name in names:
            if name.endswith(suffixes) and not name.startswith("."):
                path = Path(root, name)
                found.append(Source(readable(path.relative_to(folder)), path))
    return sorted(found)


def read_documents(
    sources: Sequence[Source], text_key: str, tally: Tally | None = None
) -> Iterator[str | list[Message]]:
    """The documents, a file or jsonl line each, never empty. Line ends stay as they are; a byte order mark is removed.

    Raises ConfigError with the file (and line) for what can't be read.
    """
    tally = tally if tally is not None else Tally()
    for source in sources:
        lines = source.name.endswith(LINE_SUFFIXES)
        try:
            for text in read_lines(source.path, text_key, tally) if lines else read_text(source.path, tally):
                tally.documents += bool(text)
                tally.empty += not text
                if text:
                    yield text
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            raise unreadable(source.path, error) from error


def read_text(path: Path, tally: Tally) -> Iterator[str]:
    yield decode(path.read_bytes().removeprefix(BOM), tally)


def read_lines(path: Path, text_key: str, tally: Tally) -> Iterator[str | list[Message]]:
    for number, line in enumerate(lines_of(path), 1):
        line = line.removeprefix(BOM) if number == 1 else line
        if not line.strip():
            continue
        where = f"data.paths: {readable(path)}, line {number}"
        try:
            record = json.loads(decode(line, tally))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}: no JSON: {error}") from error
        text = record.get(text_key) if isinstance(record, dict) else None
        if isinstance(text, str):
            yield whole(text, tally)
        elif isinstance(text, list):
            try:
                yield [Message(role, whole(said, tally)) for role, said in parse(text, text_key)]
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from None
        else:
            found = ", ".join(record) if isinstance(record, dict) else f"a {type(record).__name__}"
            raise ConfigError(
                f"{where}: no text under data.text_key={text_key}, nor a list of messages; "
                f"the line has {found or 'no keys'}"
            )


def whole(text: str, tally: Tally) -> str:
    """JSON can spell half of a surrogate pair (\\ud83d), which UTF-8 has no bytes for."""
    return text if text.isascii() else decode(text.encode("utf-8", "surrogatepass"), tally)


def decode(data: bytes, tally: Tally) -> str:
    """UTF-8, with U+FFFD for what is not."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        tally.repaired += 1
        return data.decode(errors="replace")


def lines_of(path: Path) -> Iterator[bytes]:
    """The lines of a plain, gzip or zstandard file."""
    if path.name.endswith(".zst"):
        yield from split_lines(zstandard_blocks(path))
    else:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb") as stream:
            yield from stream


def zstandard_blocks(path: Path) -> Iterator[bytes]:
    """The content of all frames. Raises EOFError for a file that was cut off, which the library's reader accepts."""
    frame = None
    for block in blocks(path):
        while block:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            yield frame.decompress(block)
            block = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("compressed file ended before its end-of-stream marker was reached")


def split_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their newline; linear in time also for a line over thousands of chunks."""
    rest: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        rest.append(first)
        if others:
            yield b"".join(rest)
            yield from others[:-1]
            rest = [others[-1]]
    yield b"".join(rest)


def unreadable(path: str | Path, error: Exception) -> ConfigError:
    return ConfigError(f"data.paths: {readable(path)}: {getattr(error, 'strerror', None) or error}")


def _refuse(error: OSError) -> None:
    raise unreadable(error.filename, error) from error
