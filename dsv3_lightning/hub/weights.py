"""The weight files of a Hugging Face folder: safetensors, or the pickled ones of older releases (DeepSeek LLM)."""

import json
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsv3_lightning.errors import ConfigError

NAMES = ("model.safetensors", "pytorch_model.bin")  # the first that is there, whole or by an index, is taken


class Weights(Protocol):
    """An open file, of which a tensor is read when it is asked for."""

    def keys(self) -> list[str]: ...

    def shape(self, key: str) -> tuple[int, ...]: ...

    def tensor(self, key: str) -> Tensor: ...


class Safetensors:
    def __init__(self, path: Path) -> None:
        self.file = safe_open(path, framework="pt")

    def keys(self) -> list[str]:
        return list(self.file.keys())

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.file.get_slice(key).get_shape())

    def tensor(self, key: str) -> Tensor:
        return self.file.get_tensor(key)


class Pickled:
    """Only tensors are accepted, no code runs; they stay in the file until they are used."""

    def __init__(self, path: Path) -> None:
        self.tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    def keys(self) -> list[str]:
        return list(self.tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].shape)

    def tensor(self, key: str) -> Tensor:
        return self.tensors[key]


def open_weights(folder: Path) -> dict[str, Weights]:
    """Every weight file of the folder, by name. Raises ConfigError."""
    name = next((n for n in NAMES if (folder / n).is_file() or index_of(folder, n).is_file()), NAMES[0])
    kind = Safetensors if name.endswith(".safetensors") else Pickled
    index = index_of(folder, name)
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [name]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{index}: is no index of weight files ({error})") from error
    opened: dict[str, Weights] = {}
    for name in names:
        try:
            opened[name] = kind(folder / name)
        except Exception as error:  # torch raises half a dozen kinds for a damaged file
            reason = f"{error}".strip().splitlines()[0] if f"{error}".strip() else type(error).__name__
            raise ConfigError(f"{folder / name}: can't be read ({reason})") from error
    return opened


def index_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.index.json"


READ_ERRORS = (OSError, SafetensorError)
