"""The files of a corpus: which files of `data.paths` are read and which are left out. Imports no torch."""

import glob
import importlib.util
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dsv3_lightning.common.files import utf8_path
from dsv3_lightning.common.paths import user_path
from dsv3_lightning.data.config import PACKAGE, DataConfig, is_pattern, is_url
from dsv3_lightning.data.readers.kinds import kind_of, suffixes_of
from dsv3_lightning.data.text.tally import HIDDEN, listed
from dsv3_lightning.errors import ConfigError

PACKED = ("", ".gz", ".zst")
TEXT_SUFFIXES = tuple(kind + packed for kind in (".txt", ".md", ".py") for packed in PACKED)
LINE_SUFFIXES = tuple(".jsonl" + packed for packed in PACKED)
READ = TEXT_SUFFIXES + LINE_SUFFIXES
READ_SHOWN = ".txt .md .py .jsonl, also as .gz or .zst"
# Left out of the standard library and of packages: tests, which Debian packages separately, so corpora would differ;
# third-party code; and generated tables (character sets, the text of help()), which are a sixth of the library's bytes
# and a third of its tokens.
LEFT_OUT_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)
# Files that accompany a downloaded data set and aren't its text.
CARD = re.compile(
    r"(readme|licen[sc]e|notice|citation|changelog|contributing|code_of_conduct|security|requirements|"
    r"(data|dataset|model)[-_]?card)\b.*"
)
# Data files in formats that aren't supported.
DATA = frozenset(
    ".parquet .csv .tsv .json .ndjson .arrow .feather .orc .avro .xlsx .tar .tgz .zip .7z .gz .zst .xz .bz2 .h5 .hdf5 "
    ".npy .npz .pkl .pickle .db .sqlite .tfrecord .mds .warc .wet .bin".split()
)


class Source(NamedTuple):
    """A file. name: its path below the given folder, which identifies it wherever the corpus is.

    origin: the source of its text, for metrics by origin: its name in data.sources; or the given path, or if that is a
    single folder (or the standard library), the first folder below it.
    text_key: as in SourceConfig. setting: the one that names it, for messages. marks: a .npy file, uint8 [documents], 0
    for the documents that are read; None: all are. kind: as in SourceConfig; None: by the name's ending. tokenizer: as
    there. begin, end: of a plain file of lines, only those that begin in these bytes; None: up to the file's end.
    """

    name: str
    path: Path
    origin: str = ""
    text_key: str | None = None
    setting: str = "data.paths"
    begin: int = 0
    end: int | None = None
    marks: Path | None = None
    kind: str | None = None
    tokenizer: str | None = None

    @property
    def where(self) -> str:
        return f"{self.setting}: {utf8_path(self.path)}"

    @property
    def shown(self) -> str:
        """The file in counts of what was read: its name, after that of its source in data.sources."""
        return self.name if self.setting == "data.paths" else f"{self.origin}/{self.name}"


def sources_of(config: DataConfig, left_out: Counter[str] | None = None) -> list[Source]:
    """The files of a whole corpus: of `data.sources`, one source after the other, or of `data.paths`.

    left_out: as in `find_sources`. Raises ConfigError.
    """
    if config.sources is None:
        return find_sources(config.paths, left_out)
    found = []
    for name, given in config.sources.items():
        setting, cache = f"data.sources.{name}.paths", user_path(config.cache_dir)
        for path in given.paths:
            for source in find_named(path, given.kind, left_out, setting, cache):
                kind = (kind_of(source.name) or "text") if given.kind == "auto" else given.kind
                found.append(
                    source._replace(
                        origin=name, text_key=given.text_key, setting=setting, kind=kind, tokenizer=given.tokenizer
                    )
                )
    return found


def find_named(path: str, kind: str, left_out: Counter[str] | None, setting: str, cache: Path) -> list[Source]:
    """The files of one of a source's paths: a file, a folder, a pattern, package:NAME or a URL. Raises ConfigError."""
    if is_url(path):
        from dsv3_lightning.data.readers.remote import fetched  # loads fsspec

        return [Source(name, local) for name, local in fetched(path, suffixes_of(kind), cache, setting)]
    if not is_pattern(path):
        return find_sources([path], left_out, setting, kind)
    matching = sorted(glob.glob(path, recursive=True))
    if not matching:
        raise ConfigError(f"{setting}: {path} matches no file")
    return [source for one in matching for source in find_sources([one], left_out, setting, kind)]


def find_sources(
    paths: Sequence[str], left_out: Counter[str] | None = None, setting: str = "data.paths", kind: str | None = None
) -> list[Source]:
    """The files of `DataConfig.paths` in the order given, folders sorted by path; [] is the standard library, and
    package:NAME the Python files of an installed package.

    left_out: counts the files of given folders that aren't read, by suffix, and those that are hidden.
    setting: the one that names the paths, for messages. kind: of a source's files; None: those of `data.paths`.
    Raises ConfigError for a path that doesn't exist, a suffix that isn't read, and a folder without any text, or whose
    only text describes data that can't be read.
    """
    if not paths:
        return by_folder(walk(Path(sysconfig.get_paths()["stdlib"]), (".py",), LEFT_OUT_FOLDERS))
    sources: list[Source] = []
    read = READ if kind is None else suffixes_of(kind)
    for given in paths:
        if given.startswith(PACKAGE):
            found = walk(package_folder(given, setting), (".py",), LEFT_OUT_FOLDERS)
            sources += [source._replace(origin=given) for source in found]
            continue
        path = user_path(given)
        if not path.exists():
            raise ConfigError(f"{setting}: {given} does not exist")
        unread: Counter[str] = Counter()
        if path.is_dir():
            found = walk(path, read, unread=unread, setting=setting)
        else:
            found = (
                [Source(utf8_path(path.name), path)]
                if path.name.lower().endswith(read) or kind not in (None, "auto")
                else []
            )
        if not found:
            shown = READ_SHOWN if kind is None else " ".join(read)
            holds = f" (it holds {listed(unread)})" if unread else ""
            raise ConfigError(f"{setting}: {given} is no text; read are {shown}{holds}")
        if path.is_dir():
            refuse_cards_alone(f"{setting}: {given}", path, found, unread)
        if left_out is not None:
            left_out.update(unread)
        sources += [source._replace(origin=utf8_path(path.name)) for source in found]
    single = len(paths) == 1 and (paths[0].startswith(PACKAGE) or user_path(paths[0]).is_dir())
    return by_folder(sources) if single else sources


def refuse_cards_alone(where: str, folder: Path, found: list[Source], unread: Counter[str]) -> None:
    """Raises ConfigError if the only texts in a data set's folder are its README or its loading script."""
    data = {label: number for label, number in unread.items() if "." + label.split(".")[-1] in DATA or first(label)}
    script = f"{folder.name.lower()}.py"
    names = [source.path.name.lower() for source in found]
    if data and all(CARD.fullmatch(name) or name == script for name in names):
        shown = ", ".join(source.name for source in found[:3]) + (" …" if len(found) > 3 else "")
        raise ConfigError(
            f"{where} holds data of kinds that aren't read ({listed(data)}), and the only text in it is "
            f"{shown}; write the data as .jsonl, or name that file itself to train on it"
        )


def first(label: str) -> bool:
    """Whether the first part of a suffix such as .json.gz is that of a data file."""
    return "." + label.split(".")[1] in DATA if label.startswith(".") else False


def package_folder(given: str, setting: str) -> Path:
    """The folder of the installed package of `package:NAME`, which isn't imported. Raises ConfigError."""
    name = given.removeprefix(PACKAGE)
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"{setting}: {given} is not an installed package with a folder of its own")
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
    """{origin: its name}; with more than `limit` origins that the user didn't name, `others` for all but the
    `limit - 1` largest.
    """
    sizes: dict[str, int] = {}
    for source in sources:
        sizes[source.origin] = sizes.get(source.origin, 0) + source.path.stat().st_size
    largest = sorted(sizes, key=lambda origin: (-sizes[origin], origin))
    named = any(source.setting != "data.paths" for source in sources)
    kept = largest if named or len(largest) <= limit else largest[: limit - 1]
    return {origin: origin if origin in kept else "others" for origin in largest}


def walk(
    folder: Path,
    suffixes: tuple[str, ...],
    leave_out: frozenset[str] = frozenset(),
    unread: Counter[str] | None = None,
    setting: str = "data.paths",
) -> list[Source]:
    """Files below the folder with one of the suffixes, in upper or lower case, by relative path, without hidden ones.

    unread: if given, counts what is left out, and links to folders are followed, into each folder once.
    """

    def refuse(error: OSError) -> None:
        raise unreadable(f"{setting}: {utf8_path(error.filename)}", error) from error

    found, seen, waiting = [], set(), [folder]
    for start in waiting:  # links to folders are appended
        for root, folders, names in os.walk(start, onerror=refuse):
            status = os.stat(root)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            shown = [name for name in names if not name.startswith(".")]
            if unread is not None and (hidden := len(names) - len(shown) + sum(n.startswith(".") for n in folders)):
                unread[HIDDEN] += hidden
            folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in leave_out)
            if unread is not None:
                waiting += [Path(root, name) for name in folders if os.path.islink(os.path.join(root, name))]
            for name in shown:
                path = Path(root, name)
                irregular = path.exists() and not path.is_file()  # reading a pipe would block
                if name.lower().endswith(suffixes) and not irregular:
                    found.append(Source(utf8_path(path.relative_to(folder)), path))
                elif unread is not None:
                    unread["of no regular kind" if irregular else suffix_of(name)] += 1
    return sorted(found)


def suffix_of(name: str) -> str:
    """A file's suffix in lower case, with both parts of a compressed file's.

    >>> suffix_of("c4.JSON.gz"), suffix_of("a.b.csv"), suffix_of("Makefile")
    ('.json.gz', '.csv', 'without a suffix')
    """
    suffixes = Path(name.lower()).suffixes
    packed = len(suffixes) > 1 and suffixes[-1] in (".gz", ".zst", ".xz", ".bz2", ".zip")
    return "".join(suffixes[-2:] if packed else suffixes[-1:]) or "without a suffix"


def unreadable(where: str, error: Exception) -> ConfigError:
    return ConfigError(f"{where}: {getattr(error, 'strerror', None) or error}")
