"""The room that a run's checkpoints need on the disk, compared with what is free before the first step."""

import shutil
from pathlib import Path
from typing import Any

from dsv3_lightning.config.checks import mesh_strategy
from dsv3_lightning.config.schema import Config
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.planning.memory import checkpoint_bytes


def check_space(config: Config, folder: Path, precision: str) -> str | None:
    """A warning if the disk can't hold as many checkpoints as are kept; None if it can.

    Raises ConfigError where not even the next one fits.
    """
    settings: dict[str, Any] | None = config.callbacks.get("checkpoint")
    if settings is None:
        return None
    kept = settings["keep"] + settings["keep_best"]
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free, files = shutil.disk_usage(there).free, folder / "checkpoints"
    sharded, optimizer = mesh_strategy(config.strategy) is not None, config.optimizer
    one = checkpoint_bytes(config.model, precision, sharded, optimizer.moment_bytes, copies(config), optimizer.kind)
    return judge(files, free, used(files), one, kept)


def copies(config: Config) -> int:
    """How many copies of the weights a checkpoint holds beside them: their average, and GRPO's reference. The
    reference of DPO is two numbers per pair."""
    averaged = config.callbacks.get("weight_average") is not None
    return averaged + (config.grpo is not None and config.grpo.beta > 0)


def judge(files: Path, free: int, used: int, one: int, kept: int) -> str | None:
    """What to say of `kept` checkpoints of `one` byte count each, and one more while it is written.

    free: bytes of the disk. used: bytes of the checkpoints that are there. Raises ConfigError.

    >>> judge(Path("checkpoints"), 4 * 10**9, 0, 10**9, 3)
    >>> judge(Path("checkpoints"), 2 * 10**9, 10**9, 10**9, 3)  # doctest: +ELLIPSIS
    'checkpoints: 3 of about 1.00 GB are kept and one more is written beside them, but 2.00 GB are free: the disk...'
    """
    if free < one:
        raise ConfigError(
            f"{files}: a checkpoint takes about {gigabytes(one)}, but {gigabytes(free)} are free; "
            "make room, or choose another run.dir"
        )
    if free + used >= (kept + 1) * one:
        return None
    return (
        f"{files}: {kept} of about {gigabytes(one)} are kept and one more is written beside them, "
        f"but {gigabytes(free)} are free: the disk will be full before all are there"
    )


def gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB"


def used(files: Path) -> int:
    """Bytes of the checkpoints in a folder; hard links count once."""
    found = [path.stat() for path in files.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum({status.st_ino: status.st_size for status in found}.values())
