"""`dsv3 prepare`: tokenizes and packs a config's data in advance, which otherwise the run does."""

import argparse
import os
from typing import Any

from dsv3_lightning.commands import settings
from dsv3_lightning.common.flags import positive
from dsv3_lightning.common.table import si, table
from dsv3_lightning.errors import ConfigError


def arguments(parser: argparse.ArgumentParser) -> None:
    settings.arguments(parser, "[--jobs N] [--shard I/N] [--keep-dropped] ")
    parser.add_argument("--jobs", type=positive, metavar="N", default=cores(), help="processes (default: one per core)")
    parser.add_argument(
        "--shard",
        metavar="I/N",
        default="0/1",
        help="do part I of N, beside the other parts on this or other machines with the same data.cache_dir",
    )
    parser.add_argument(
        "--keep-dropped",
        action="store_true",
        help="write what data.cleaning drops, with its reason, as dropped.jsonl.zst",
    )


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@settings.command
def run(given: settings.Settings, jobs: int, shard: str, keep_dropped: bool) -> int:
    from dsv3_lightning.data.batches.index import cuts_of, prepare_index
    from dsv3_lightning.data.stages.tasks import Shard
    from dsv3_lightning.data.text.compressors import compressed_sources
    from dsv3_lightning.data.text.prepare import prepare
    from dsv3_lightning.data.text.report import report
    from dsv3_lightning.data.text.store import read_manifest
    from dsv3_lightning.data.text.tokenizer import Tokenizer

    config = given.config
    if keep_dropped and config.data.cleaning is None:
        raise ConfigError("--keep-dropped: needs data.cleaning, without which nothing is dropped")
    folder = prepare(config.data, jobs=jobs, shard=Shard.parse(shard), keep_dropped=keep_dropped)
    prepare_index(folder, cuts_of(config.data, config.model.mtp_depth))
    manifest = read_manifest(folder)
    rows = [("", "documents", "text", "tokens", "bytes per token")]
    rows += [(name, *counts(split)) for name, split in manifest["splits"].items()]
    print(table(rows))
    whose = "the validation text"
    if "answer_bytes" in manifest["splits"]["train"]:
        train, validation = (si(split["answer_bytes"], "B") for split in manifest["splits"].values())
        print(f"learned of conversations is what the assistant says: of all text {train} and {validation}")
        whose = "what the assistant says there"
    if manifest["gzip_bpb"]:
        print(f"gzip -9 takes {manifest['gzip_bpb']:.3f} bits per byte of {whose}")
    if config.data.sources is not None:
        print(table(compressed_rows(compressed_sources(folder, Tokenizer.from_file(folder)))))
    print(folder)
    print(report(folder, config.data, jobs, keep_dropped))
    return 0


def counts(split: dict[str, int]) -> tuple[str, str, str, str]:
    tokens, size = split["tokens"], split["text_bytes"]
    return f"{split['documents']:,}", si(size, "B"), f"{tokens:,}", f"{size / tokens:.2f}" if tokens else "-"


def compressed_rows(sources: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """What gzip and xz need for the validation text of each source."""
    keys = ("gzip_bpb", "xz_bpb", "gzip_stream_bpb", "xz_stream_bpb")
    return [("bits per byte", "gzip -9", "xz -6", "gzip, one stream", "xz, one stream")] + [
        (name, *("-" if facts[key] is None else f"{facts[key]:.3f}" for key in keys)) for name, facts in sources.items()
    ]
