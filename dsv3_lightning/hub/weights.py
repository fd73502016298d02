"""Weight files of a Hugging Face folder: safetensors, or pickled ones as in older releases (DeepSeek LLM)."""

from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsv3_lightning.common.json_files import read_json, refuse_pointer, shown
from dsv3_lightning.errors import ConfigError

NAMES = ("model.safetensors", "pytorch_model.bin")  # the first one found is used, as a single file or by its index
WIDE = ("F64", "F32", "F16", "BF16")  # unscaled dtypes, by their safetensors names
NARROW = ("F8_E4M3", "F8_E5M2")  # dtypes that need scales
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Weights(Protocol):
    """An open file whose tensors are read on demand."""

    def keys(self) -> list[str]: ...

    def shape(self, key: str) -> tuple[int, ...]: ...

    def dtype(self, key: str) -> str: ...

    def tensor(self, key: str) -> Tensor: ...


class Safetensors:
    def __init__(self, path: Path) -> None:
        self.file = safe_open(path, framework="pt")

    def keys(self) -> list[str]:
        return list(self.file.keys())

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.file.get_slice(key).get_shape())

    def dtype(self, key: str) -> str:
        return str(self.file.get_slice(key).get_dtype())

    def tensor(self, key: str) -> Tensor:
        return self.file.get_tensor(key)


class Pickled:
    """A pickled file, loaded with `weights_only` and memory-mapped; holds only tensors."""

    def __init__(self, path: Path) -> None:
        self.tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(self.tensors, dict) or not all(map(torch.is_tensor, self.tensors.values())):
            raise ConfigError("it holds something other than named tensors")

    def keys(self) -> list[str]:
        return list(self.tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].shape)

    def dtype(self, key: str) -> str:
        return DTYPES.get(self.tensors[key].dtype, str(self.tensors[key].dtype))

    def tensor(self, key: str) -> Tensor:
        return self.tensors[key]


class Chosen(NamedTuple):
    """The names of the weight files to use, and notes about the others."""

    names: list[str]
    notes: list[str]


def choose_weights(folder: Path) -> Chosen:
    """Chooses weight files as transformers does: safetensors first. Raises ConfigError, also for two sets of a kind."""
    name = next((n for n in NAMES if (folder / n).exists() or index_of(folder, n).exists()), NAMES[0])
    index = index_of(folder, name)
    names = names_in(index) if index.exists() else [name]
    if (folder / name).exists() and name not in names:
        raise ConfigError(
            f"{folder / name}: there is another set of weights, since {index} names {names[0]}"
            f"{f' and {len(names) - 1} more' if len(names) > 1 else ''}; remove the file, or the index with its files"
        )
    weights = {path.name for pattern in ("*.safetensors", "pytorch_model*.bin") for path in folder.glob(pattern)}
    left = sorted(weights - set(names))
    taken = index.name if index.exists() else name
    more = f" and {len(left) - 4} more" if len(left) > 4 else ""
    note = f"{folder}: weights of {taken}, as transformers takes them; not used: {', '.join(left[:4])}{more}"
    return Chosen(names, [note] if left else [])


def names_in(index: Path) -> list[str]:
    """The names of the files in an index. Raises ConfigError."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ConfigError(
            f"{index}: is no index of weight files (weight_map={shown(places)}: must be an object of file names)"
        )
    for key, name in places.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise ConfigError(f"{index}: weight_map.{key}={shown(name)}: must be the name of a file in the folder")
    return sorted(set(places.values()))


def open_weights(folder: Path, names: list[str]) -> dict[str, Weights]:
    """The opened weight files, by name. Raises ConfigError."""
    opened: dict[str, Weights] = {}
    for name in names:
        try:
            refuse_pointer(folder / name)
            opened[name] = Safetensors(folder / name) if name.endswith(".safetensors") else Pickled(folder / name)
        except ConfigError as error:
            named = str(error).startswith(str(folder))
            raise ConfigError(str(error) if named else f"{folder / name}: can't be read ({error})") from error
        except OSError as error:
            raise ConfigError(f"{folder / name}: can't be read ({error.strerror or error})") from error
        except Exception as error:  # torch raises many types for a damaged file
            reason = f"{error}".strip().splitlines()[0] if f"{error}".strip() else type(error).__name__
            raise ConfigError(f"{folder / name}: can't be read ({reason})") from error
    return opened


def index_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.index.json"


READ_ERRORS = (OSError, SafetensorError)
