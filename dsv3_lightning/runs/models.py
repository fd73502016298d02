"""Loading of models from a run, one of its checkpoints, or a Hugging Face folder."""

from pathlib import Path

import torch
from torch import Tensor

from dsv3_lightning.common.paths import user_path
from dsv3_lightning.config.schema import Config, check
from dsv3_lightning.config.stored import read_stored
from dsv3_lightning.data.text.conversation import turn_ids
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.hub.export import Read, reader
from dsv3_lightning.hub.folder import HubFolder
from dsv3_lightning.hub.tokens import read_tokenizer
from dsv3_lightning.inference.layers import lay_by_columns
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.init import fill
from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.parallel.checkpoints.names import best_files, step_files
from dsv3_lightning.parallel.checkpoints.one_file import is_checkpoint, newest_good, read_checkpoint
from dsv3_lightning.parallel.checkpoints.shard_reader import ShardReader

PREFIX = "model."  # of the model in a run's module


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
    path, run = find_checkpoint(given)
    config = stored_config(run)
    return lay_by_columns(load_model(path, config.model)), Tokenizer.from_file(run)


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


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """The checkpoint for a path, as a file or a folder of shards, and its run's folder. Raises ConfigError."""
    if is_checkpoint(path):
        return path, path.resolve().parent.parent
    if not path.is_dir():
        raise ConfigError(f"{path}: no such run folder or checkpoint")
    folder = path / "checkpoints"
    found = newest_good([*(best for _, best in best_files(folder)), *step_files(folder)], thorough=False)
    if found is None:
        raise ConfigError(f"{folder}: holds no checkpoint")
    return found[0], path


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
    if path.is_dir():
        shards = ShardReader(path)
        state = {name: shards.read(name) for name in shards.names()}
    else:
        state = read_checkpoint(path, mmap=True)["state_dict"]
    return {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}


def part_reader(path: Path) -> Read:
    """A function that reads one of the model's tensors in a checkpoint, or one expert's matrix of it, by name."""
    if not path.is_dir():
        return reader(read_weights(path), path)
    shards = ShardReader(path)
    return lambda name, expert: shards.read(PREFIX + name, expert)


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
