"""`dsv3 data`: verifies prepared token files, or shows what they hold."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3_lightning.common.flags import not_negative, positive
from dsv3_lightning.common.paths import display_path, path_argument
from dsv3_lightning.common.table import si, table
from dsv3_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dsv3_lightning.data.batches.inspecting import Part

SHOWN = 4  # damaged files that one message names
SPLITS = ("train", "validation")


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("action", choices=("verify", "inspect"), help="check every hash, or show what is there")
    add("path", type=path_argument, metavar="FOLDER", help="as dsv3 prepare prints it, or data.cache_dir (its newest)")
    add("--split", choices=SPLITS, default="train", help="for inspect: default %(default)s")
    add("--source", metavar="NAME", help="for inspect: documents of this source alone")
    add("--documents", type=not_negative, default=0, metavar="N", help="for inspect: show N of them")
    add("--sample", type=not_negative, metavar="N", help="for inspect: show sample N of the packed index as it is read")
    add("--characters", type=positive, default=400, metavar="N", help="for inspect: of each text; default %(default)s")


def run(
    action: str, path: Path, split: str, source: str | None, documents: int, sample: int | None, characters: int
) -> int:
    """action: `verify` or `inspect`. Raises ConfigError for damaged files."""
    folder = prepared_folder(path)
    if action == "verify":
        return verify(folder)
    return inspect(folder, split, source, documents, sample, characters)


def prepared_folder(path: Path) -> Path:
    """The folder itself if it holds prepared data, or the newest one below it. Raises ConfigError."""
    found = [path / "manifest.json"] if (path / "manifest.json").is_file() else list(path.glob("*/manifest.json"))
    if not found:
        work = sorted(path.glob("*.work"))
        begun = f" ({work[0].name} was begun and is not complete)" if work else ""
        raise ConfigError(f"{path}: holds no prepared data{begun}; dsv3 prepare prints the folder")
    return max(found, key=lambda file: file.stat().st_mtime).parent


def verify(folder: Path) -> int:
    from dsv3_lightning.data.text.store import FORMAT, read_manifest
    from dsv3_lightning.data.text.verifying import damages

    try:
        manifest = read_manifest(folder)
        files, number = manifest["files"], manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / 'manifest.json'}: is damaged ({' '.join(str(error).split())})") from error
    if number != FORMAT:
        raise ConfigError(f"{folder}: has format {number}, this version reads {FORMAT}; prepare the data again")
    if found := list(damages(folder, manifest)):
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise ConfigError(
            f"{display_path(folder)}: damaged: {'; '.join(found[:SHOWN])}{more}; remove the folder, and dsv3 prepare "
            "makes it again"
        )
    size = sum(file["bytes"] for file in files.values())
    print(f"{display_path(folder)}: {len(files)} files, {si(size, 'B')}, all as they were written")
    return 0


def inspect(folder: Path, split: str, source: str | None, documents: int, sample: int | None, characters: int) -> int:
    from dsv3_lightning.data.batches import inspecting
    from dsv3_lightning.data.batches.index import MappedIndex
    from dsv3_lightning.data.text.store import TokenFile
    from dsv3_lightning.data.text.tokenizer import Tokenizer

    file, tokenizer = TokenFile(folder, split), Tokenizer.from_file(folder)
    if documents or source is not None:
        show(inspecting.documents_of(file, tokenizer, source, documents or 3), characters)
        return 0
    if sample is not None:
        built = inspecting.indexes(folder, split)
        if not built:
            raise ConfigError(f"{folder}: the {split} split isn't packed yet; dsv3 prepare does it")
        print(f"sample {sample} of {built[0].name}")
        show(inspecting.parts_of_sample(file, tokenizer, MappedIndex.open(built[0]), sample), characters)
        return 0
    print(table([(display_path(folder), ""), *inspecting.facts(file.manifest)], left=(0, 1)))
    rows = [("", "source", "documents", "text", "tokens")]
    for name in SPLITS:
        for origin, numbers in origins_of(file.manifest, name).items():
            rows.append(
                (name, origin, f"{numbers['documents']:,}", si(numbers["text_bytes"], "B"), f"{numbers['tokens']:,}")
            )
    print(table(rows, left=(0, 1)))
    other = inspecting.v3_tokenizer()
    header = ("bytes per token", "here", *(["DeepSeek-V3's"] if other is not None else []))
    compared = inspecting.bytes_per_token(file, tokenizer, other)
    print(table([header, *((name, *(f"{value:.2f}" for value in found)) for name, found in compared.items())]))
    return 0


def origins_of(manifest: dict[str, Any], split: str) -> dict[str, dict[str, int]]:
    """Counts by source; of the whole split in manifests of older versions."""
    found: dict[str, dict[str, int]] = manifest.get("splits_by_origin", {}).get(split) or {
        "all": manifest["splits"][split]
    }
    return found


def show(parts: "Iterable[Part]", characters: int) -> None:
    for part in parts:
        inside = ", begun in another sample" if part.inside else ""
        print(f"--- document {part.document:,} of {part.origin}, {part.tokens:,} tokens{inside}")
        print(
            part.text if len(part.text) <= characters else f"{part.text[:characters]}… ({len(part.text):,} characters)"
        )
