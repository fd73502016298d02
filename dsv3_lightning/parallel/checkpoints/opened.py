"""One way to look into a checkpoint, whether it is a file or a folder of shards."""

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.parallel.checkpoints.one_file import complete, first_good, read_checkpoint
from dsv3_lightning.parallel.checkpoints.shard_reader import ShardReader


class OpenCheckpoint(Protocol):
    """A checkpoint whose tensors are read when they are asked for."""

    path: Path

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run that wrote it."""
        ...

    def outline(self) -> dict[str, Any]:
        """Everything that the checkpoint holds, as one file would; tensors may be on the meta device."""
        ...

    def names(self) -> list[str]:
        """The tensors of the module's state dict."""
        ...

    def read(self, name: str, expert: int | None = None) -> Tensor:
        """A tensor of the module's state dict, or the matrix of one expert. Raises ConfigError if there is none."""
        ...


class OneFile:
    """A checkpoint in one file, mapped into memory: its tensors stay in the file until they are used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = read_checkpoint(path, mmap=True)

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.state["settings"])

    def outline(self) -> dict[str, Any]:
        return self.state

    def names(self) -> list[str]:
        return list(self.state["state_dict"])

    def read(self, name: str, expert: int | None = None) -> Tensor:
        if name not in self.state["state_dict"]:
            raise ConfigError(f"{self.path}: holds no {name}")
        tensor: Tensor = self.state["state_dict"][name]
        return tensor if expert is None else tensor[expert]


def open_checkpoint(path: Path) -> OpenCheckpoint:
    """A file or a folder of shards. Raises ConfigError where it is missing, damaged or not a whole checkpoint."""
    if not path.is_dir():
        return OneFile(path)
    shards = ShardReader(path)
    complete(shards.rest, path)
    return shards


def open_newest(paths: list[Path]) -> OpenCheckpoint | None:
    """The first of `paths` (newest first) that can be opened; warns of those that can't."""
    return first_good(paths, open_checkpoint)
