"""Single-file checkpoints: atomic writes, safe loading (`weights_only`), and validation before use."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from zipfile import ZipFile

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from dsv3_lightning.common.files import whole
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.parallel.checkpoints import loading, metadata, shards
from dsv3_lightning.parallel.checkpoints.names import REST

T = TypeVar("T")
# The entries that resuming requires; the data position is the loader's "next_sample".
PARTS = (
    "state_dict",
    "optimizer_states",
    "lr_schedulers",
    "loops",
    "global_step",
    "skipped_steps",
    "validated",
    "settings",
)
POSITION = ("DataModule", "next_sample")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, even if power fails. Loads with `weights_only=True`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        with whole(Path(path)) as beside:
            shards.write(checkpoint, beside)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = "cpu", weights_only: bool | None = True, mmap: bool = False
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path), mmap)


def read_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    """The checkpoint's content, on the CPU. Raises ConfigError if it is missing, truncated, unsafe or incomplete.

    mmap: tensors are read from the file when they are used.
    """
    if path.is_dir():
        return complete(loading.read_whole(path), path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises many types for a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{path}: not a readable checkpoint ({reason})") from error
    return complete(checkpoint, path)


def is_checkpoint(path: Path) -> bool:
    """True for a checkpoint file or a folder of shards."""
    return path.is_file() or (path / REST).is_file()


def complete(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """The checkpoint, if it has all that resuming requires. Raises ConfigError."""
    missing = [key for key in PARTS if key not in checkpoint]
    if not any(
        POSITION[0] in key and POSITION[1] in value for key, value in checkpoint.items() if isinstance(value, dict)
    ):
        missing.append("data position")
    if missing:
        raise ConfigError(f"{path}: not a checkpoint that a run can resume from; it lacks {', '.join(missing)}")
    return checkpoint


def step_of(path: Path, thorough: bool = True) -> int:
    """The step of a checkpoint that a run can resume from; loads no tensors. Raises ConfigError.

    thorough: compare every byte of a file with its checksum.
    """
    if path.is_dir():
        step: int = complete(loading.read_rest(path), path)["global_step"]
        metadata.read_index(path)  # raises if a file is missing or cut
        return step
    checkpoint = read_checkpoint(path, mmap=True)
    if thorough and (damaged := ZipFile(path).testzip()) is not None:
        raise ConfigError(f"{path}: not a readable checkpoint ({damaged} differs from its checksum)")
    return checkpoint["global_step"]


def made_with(path: Path) -> tuple[dict[str, Any], set[str]]:
    """The settings of the run that wrote the checkpoint, and the keys of its callbacks' states. Raises ConfigError."""
    content = complete(loading.read_rest(path), path) if path.is_dir() else read_checkpoint(path, mmap=True)
    return content["settings"], set(content.get("callbacks", {}))


def newest_good(paths: list[Path], thorough: bool = True) -> tuple[Path, int] | None:
    """The first of `paths` (newest first) that a run can resume from, and its step; warns of invalid ones."""
    return first_good(paths, lambda path: (path, step_of(path, thorough)))


def first_good(paths: list[Path], look: Callable[[Path], T]) -> T | None:
    """look(path) of the first path for which it raises no ConfigError; warns of those for which it does."""
    for path in paths:
        try:
            return look(path)
        except ConfigError as error:
            warnings.warn(f"{error}; trying the one before", stacklevel=2)
    return None
