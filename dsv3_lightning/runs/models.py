"""Loading of models from a run, one of its checkpoints, or a Hugging Face folder."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv3_lightning.common.paths import user_path
from dsv3_lightning.config.schema import Config, check
from dsv3_lightning.config.stored import complete
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
from dsv3_lightning.parallel.checkpoints.one_file import is_checkpoint
from dsv3_lightning.parallel.checkpoints.opened import OpenCheckpoint, open_checkpoint, open_newest
from dsv3_lightning.runs.record import read_report, stored_config

PREFIX = "model."  # of the model in a run's module
CARRIED = "run"  # the key under which a consolidated file has its run's tokenizer and report


class Found(NamedTuple):
    """A run's checkpoint and what is needed to use its model.

    folder: the default folder for results: the run's, or the one that a consolidated file lies in.
    report: the content of report.json; empty where the run has none yet.
    """

    checkpoint: OpenCheckpoint
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
    return lay_by_columns(load_model(found.checkpoint, found.config.model)), found.tokenizer


def find_checkpoint(path: Path) -> Found:
    """A checkpoint by its name, or the best of a run's folder, else the newest. Raises ConfigError.

    A consolidated file carries what any other checkpoint takes from its run's folder.
    """
    if is_checkpoint(path):
        checkpoint = open_checkpoint(path)
        carried = checkpoint.outline().get(CARRIED) if path.is_file() else None
        if carried is not None:
            config = check(complete(checkpoint.settings))
            return Found(checkpoint, path.parent, config, Tokenizer(*carried["tokenizer"]), carried["report"])
        folder = run_of(path)
        if folder is None:
            raise ConfigError(
                f"{path}: is in no run's folder; dsv3 checkpoint consolidate makes a file that can be used anywhere"
            )
        return Found(checkpoint, folder, stored_config(folder), *tokenizer_and_report(folder))
    if not path.is_dir():
        raise ConfigError(f"{path}: no such run folder or checkpoint")
    return Found(best_checkpoint(path), path, stored_config(path), *tokenizer_and_report(path))


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint lies in, if it does."""
    folder = checkpoint.resolve().parent.parent
    return folder if (folder / "config.yaml").is_file() else None


def best_checkpoint(run: Path) -> OpenCheckpoint:
    """The run's best checkpoint, by default by the lowest validation loss, else the newest. Raises ConfigError."""
    folder = run / "checkpoints"
    found = open_newest([*(best for _, best in best_files(folder)), *step_files(folder)])
    if found is None:
        raise ConfigError(f"{folder}: holds no checkpoint")
    return found


def tokenizer_and_report(run: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer and the report in a run's folder; the report is empty if there is none yet. Raises ConfigError."""
    return Tokenizer.from_file(run), read_report(run) or {}


def carry(content: dict[str, Any], run: Path) -> None:
    """Adds the run's tokenizer and report to a checkpoint, which can then be used anywhere. Raises ConfigError."""
    tokenizer, report = tokenizer_and_report(run)
    content[CARRIED] = {"tokenizer": [tokenizer.serialized, *tokenizer.names], "report": report}


def load_model(checkpoint: OpenCheckpoint, config: ModelConfig) -> Transformer:
    """The model with a checkpoint's weights, fp32, on CPU. Raises ConfigError if keys or shapes differ."""
    model = empty_model(config)
    try:
        model.load_state_dict(read_weights(checkpoint))
    except RuntimeError as error:
        raise ConfigError(f"{checkpoint.path}: {error}") from error
    return model.eval()


def read_weights(checkpoint: OpenCheckpoint) -> dict[str, Tensor]:
    """The model's tensors in a checkpoint, by their names in the model; those of a file are loaded lazily."""
    names = [name for name in checkpoint.names() if name.startswith(PREFIX)]
    return {name.removeprefix(PREFIX): checkpoint.read(name) for name in names}


def part_reader(checkpoint: OpenCheckpoint) -> Read:
    """A function that reads one of the model's tensors in a checkpoint, or one expert's matrix of it, by name."""
    return lambda name, expert: checkpoint.read(PREFIX + name, expert)


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
