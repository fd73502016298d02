"""Cached preparation of pairs and prompts: a folder named by a hash of what it is made of. Imports no torch."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_lightning.common.files import remove_leftovers, whole, write_file
from dsv3_lightning.common.paths import user_path
from dsv3_lightning.data.config import DataConfig
from dsv3_lightning.data.text.digests import Digests
from dsv3_lightning.data.text.documents import hash_of
from dsv3_lightning.data.text.encoding import SPLITS
from dsv3_lightning.data.text.identity import changes, key_of
from dsv3_lightning.data.text.prepare import locked
from dsv3_lightning.data.text.progress import say
from dsv3_lightning.data.text.store import FORMAT, is_complete, read_manifest, write_manifest
from dsv3_lightning.data.text.survey import validation_threshold
from dsv3_lightning.data.text.token_names import end_ids
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.data.tuning.lines import Lines, files_of, read
from dsv3_lightning.errors import ConfigError


def prepare_lines(
    config: DataConfig, pairs: bool, reserved: int, known: dict[str, Any] | None, tell: Callable[[str], None] = say
) -> Path:
    """The folder with the lines of data.paths in tokens, made if need be; several processes may call it.

    reserved: tokens that an answer still to be sampled may take. A line that is longer than data.sequence_length is
    left out. known: the inputs of a run that resumes; others are refused. Raises ConfigError.
    """
    kind, tokenizer = "dpo" if pairs else "grpo", tokenizer_of(config)
    digests = Digests(user_path(config.cache_dir) / "digests.json")
    files = [
        [source.name, source.origin, source.path.stat().st_size, digests.of(source.path)] for source in files_of(config)
    ]
    inputs = {
        "format": FORMAT, "kind": kind, "files": files, "skip_bad_lines": config.skip_bad_lines,
        "validation_fraction": config.validation_fraction, "room": [config.sequence_length, reserved],
        "tokenizer": [*tokenizer.names, tokenizer.sha256, *sorted(map(str, tokenizer.end_ids))],
    }  # fmt: skip
    if known is not None and (differing := changes(known, inputs)):
        raise ConfigError(f"data: this run's were made of other inputs ({differing}); choose another run.name")
    folder = user_path(config.cache_dir) / key_of(inputs)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        digests.save()
        with locked(folder):
            if not is_complete(folder):
                remove_leftovers(folder.parent, folder.name)
                with whole(folder) as beside:
                    write(beside, config, tokenizer, pairs, reserved, inputs)
    except OSError as error:
        raise ConfigError(f"data.cache_dir={config.cache_dir}: {error.strerror or error}") from error
    for line in read_manifest(folder)["notes"]:
        tell(line)
    return folder


def tokenizer_of(config: DataConfig) -> Tokenizer:
    """The given tokenizer, with every token that ends an answer. Raises ConfigError."""
    if config.tokenizer is None:
        raise ConfigError("data.tokenizer: null; set init_from to the model that is tuned, or name its tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(config.tokenizer).ending_with(config.end_token)
    except ConfigError as error:
        raise ConfigError(f"data.tokenizer: {error}") from error
    place = user_path(config.tokenizer)
    tokenizer.end_ids |= end_ids(place if place.is_dir() else place.parent)
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"data.vocab_size={config.vocab_size}: the ids of data.tokenizer={config.tokenizer} go up to "
            f"{tokenizer.vocab_size - 1}; needs at least {tokenizer.vocab_size}"
        )
    return tokenizer


def write(
    folder: Path, config: DataConfig, tokenizer: Tokenizer, pairs: bool, reserved: int, inputs: dict[str, Any]
) -> None:
    folder.mkdir()
    found, skipped = read(config, tokenizer, pairs)
    room = config.sequence_length + 1 - reserved
    kept = [line for line in found if len(line.prompt) + max(map(len, line.answers), default=0) <= room]
    what, where = ("pairs" if pairs else "prompts"), f"data.paths={config.paths}"
    long = f"{len(found) - len(kept)} {what} of more than {room} tokens"
    if not kept:
        left_out = f"; {long} (data.sequence_length={config.sequence_length})" if found else ""
        raise ConfigError(f"{where}: no {what}{left_out}")
    notes = (
        [f"data: left out: {long} (data.sequence_length={config.sequence_length})"] if len(kept) < len(found) else []
    )
    notes += [f"data: left out (data.skip_bad_lines): {skipped} bad lines"] if skipped else []
    hashes = [hash_of(json.dumps(line.shown).encode()) for line in kept]  # a prompt is on one side of the split
    last_validation = validation_threshold(hashes, config.validation_fraction)
    splits, files = {}, {}
    for split in SPLITS:
        own = [line for line, one in zip(kept, hashes) if (one <= last_validation) == (split == "validation")]
        sizes = [[0, len(line.prompt), *map(len, line.answers)] for line in own]
        tokens = [token for line in own for part in (line.prompt, *line.answers) for token in part]
        starts = np.cumsum([0, *map(sum, sizes)], dtype=np.int64)[:-1]
        bounds = np.array(sizes, dtype=np.int64).reshape(len(own), 4 if pairs else 2).cumsum(1) + starts[:, None]
        stream = io.BytesIO()
        np.savez(stream, tokens=np.array(tokens, dtype=np.int32), bounds=bounds)
        texts = "".join(json.dumps([line.shown, line.columns], ensure_ascii=True) + "\n" for line in own)
        files[f"{split}.npz"] = write_file(folder / f"{split}.npz", stream.getvalue())
        files[f"{split}.jsonl"] = write_file(folder / f"{split}.jsonl", texts)
        answers = sum(map(sum, sizes)) - sum(size[1] for size in sizes)
        splits[split] = {"documents": len(own), "tokens": len(tokens), "text_bytes": 0, "answer_bytes": answers}
    write_manifest(folder, {
        "format": FORMAT, "inputs": inputs, "origins": ["all"], "gzip_bpb": None, "splits": splits, "notes": notes,
        "end_ids": sorted(tokenizer.end_ids), "files": files | tokenizer.save(folder),
    })  # fmt: skip


def read_split(folder: Path, split: str) -> Lines:
    with np.load(folder / f"{split}.npz") as arrays:
        tokens, bounds = arrays["tokens"], arrays["bounds"]
    texts = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    return Lines(tokens, bounds, [shown for shown, _ in texts], [columns for _, columns in texts])
