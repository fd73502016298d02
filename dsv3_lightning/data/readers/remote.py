"""Files behind fsspec URLs (s3, gs, hf, https, memory, ...), fetched once into the cache of prepared data."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from dsv3_lightning.common.files import BLOCK, utf8_path, whole
from dsv3_lightning.errors import ConfigError

FOLDER = "remote"


def fetched(url: str, suffixes: tuple[str, ...], cache: Path, setting: str) -> Iterator[tuple[str, Path]]:
    """Yields name and local path of the files that a URL stands for: one, those of a pattern, or those of a folder.

    A file is fetched again if its URL, or what the store says of its content, has changed. Raises ConfigError.
    """
    try:
        store, path = fsspec.core.url_to_fs(url)
        found = matching(store, path, suffixes)
    except Exception as error:  # each store has errors of its own
        raise ConfigError(f"{setting}: {url}: {reason(error)}") from error
    if not found:
        raise ConfigError(f"{setting}: {url} has no file that is read")
    for name in found:
        yield name, fetch(store, name, cache, f"{setting}: {url}")


def matching(store: Any, path: str, suffixes: tuple[str, ...]) -> list[str]:
    if any(mark in path for mark in "*?["):
        return sorted(name for name in store.glob(path) if store.isfile(name))
    if store.isdir(path):
        return sorted(name for name in store.find(path) if name.lower().endswith(suffixes))
    return [path] if store.exists(path) else []


def fetch(store: Any, name: str, cache: Path, where: str) -> Path:
    try:
        marks = f"{store.protocol} {name} {store.ukey(name)}"
        target = cache / FOLDER / hashlib.sha256(marks.encode()).hexdigest()[:16] / Path(name).name
        if not target.exists():
            with store.open(name, "rb") as source, whole(target) as beside, open(beside, "wb") as file:
                while block := source.read(BLOCK):
                    file.write(block)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{where}: {utf8_path(name)}: {reason(error)}") from error
    return target


def reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
