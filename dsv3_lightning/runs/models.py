"""Loading of models from a run, one of its checkpoints, or a Hugging Face folder."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv3_lightning.common.json_files import read_json
from dsv3_lightning.common.paths import user_path
from dsv3_lightning.config.schema import Config, check
from dsv3_lightning.config.stored import complete, read_stored
from dsv3_lightning.data.text.conversation import turn_ids
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.hub.export import Read
from dsv3_lightning.hub.folder import HubFolder
from dsv3_lightning.hub.tokens import read_tokenizer
from dsv3_lightning.inference.layers import lay_by_columns
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.init import fill
from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.parallel.checkpoints.names import best_files, step_files
from dsv3_lightning.parallel.checkpoints.one_file import is_checkpoint, newest_good, read_checkpoint
from dsv3_lightning.parallel.checkpoints.opened import open_checkpoint

PREFIX = "model."  # of the model in a run's module
CARRIED = "run"  # the key under which a consolidated file has its run's tokenizer and report


class Found(NamedTuple):
    """A run's checkpoint, a file or a folder of shards, and what is needed to use its model.

    folder: where results go unless told otherwise: the run's, or the one that a consolidated file lies in.
    report: the content of report.json; empty where the run has none yet.
    """

    path: Path
    folder: Path
    config: Config
    tokenizer: Tokenizer
    report: dict[str, Any]


def load(model: str | Path, chat: bool = False) -> tuple[Transformer, Tokenizer]:
    """The model of a run or a Hugging Face folder, fp32 on CPU, in the layout for decoding, and its tokenizer.

    chat: first check that the model can chat. Raises ConfigError.
    """
    given = user_path(model)
    if (given / "config.json").is_file():
        tokenizer = read_tokenizer(given)
        if chat:
            turn_ids(tokenizer)
        return lay_by_columns(load_hub_folder(given)), tokenizer
    found = find_checkpoint(given)
    return lay_by_columns(load_model(found.path, found.config.model)), found.tokenizer


def stored_config(folder: Path) -> Config:
    """The settings of a run's folder. Raises ConfigError."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{file}: missing, so {folder} is not a run's folder")
    tree = read_stored(file)
    try:
        return check(tree)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def find_checkpoint(path: Path) -> Found:
    """A checkpoint by its name, or the best of a run's folder, else the newest. Raises ConfigError.

    A consolidated file carries what any other checkpoint takes from its run's folder.
    """
    if is_checkpoint(path):
        content = read_checkpoint(path, mmap=True) if path.is_file() else {}
        if CARRIED in content:
            carried = content[CARRIED]
            config = check(complete(content["settings"]))
            return Found(path, path.parent, config, Tokenizer(*carried["tokenizer"]), carried["report"])
        folder = run_of(path)
        if folder is None:
            raise ConfigError(
                f"{path}: is in no run's folder; dsv3 checkpoint consolidate makes a file that can be used anywhere"
            )
        return Found(path, folder, stored_config(folder), *tokenizer_and_report(folder))
    if not path.is_dir():
        raise ConfigError(f"{path}: no such run folder or checkpoint")
    best = best_checkpoint(path)
    return Found(best, path, stored_config(path), *tokenizer_and_report(path))


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint lies in, if it does."""
    folder = checkpoint.resolve().parent.parent
    return folder if (folder / "config.yaml").is_file() else None


def best_checkpoint(run: Path) -> Path:
    """Of a run's folder the one with the lowest validation loss, else the newest. Raises ConfigError."""
    folder = run / "checkpoints"
    found = newest_good([*(best for _, best in best_files(folder)), *step_files(folder)], thorough=False)
    if found is None:
        raise ConfigError(f"{folder}: holds no checkpoint")
    return found[0]


def tokenizer_and_report(run: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """Of a run's folder; the report is empty where there is none yet. Raises ConfigError."""
    report = run / "report.json"
    return Tokenizer.from_file(run), read_json(report) if report.is_file() else {}


def carry(content: dict[str, Any], run: Path) -> None:
    """Adds the run's tokenizer and report to a checkpoint, which can then be used anywhere. Raises ConfigError."""
    tokenizer, report = tokenizer_and_report(run)
    content[CARRIED] = {"tokenizer": [tokenizer.serialized, *tokenizer.names], "report": report}


def load_model(path: Path, config: ModelConfig) -> Transformer:
    """The model with a checkpoint's weights, fp32, on CPU. Raises ConfigError if keys or shapes differ."""
    model = empty_model(config)
    try:
        model.load_state_dict(read_weights(path))
    except RuntimeError as error:
        raise ConfigError(f"{path}: {error}") from error
    return model.eval()


def read_weights(path: Path) -> dict[str, Tensor]:
    """The model's tensors in a checkpoint, by their names in the model; those of a file are loaded lazily."""
    opened = open_checkpoint(path)
    return {name.removeprefix(PREFIX): opened.read(name) for name in opened.names() if name.startswith(PREFIX)}


def part_reader(path: Path) -> Read:
    """A function that reads one of the model's tensors in a checkpoint, or one expert's matrix of it, by name."""
    opened = open_checkpoint(path)
    return lambda name, expert: opened.read(PREFIX + name, expert)


def load_hub_folder(path: Path) -> Transformer:
    folder = HubFolder(path)
    model = empty_model(folder.config)
    folder.load_into(model, fill)
    return model.eval()


def empty_model(config: ModelConfig) -> Transformer:
    """A model with uninitialized fp32 weights on CPU."""
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    model.tie_weights()
    return model
