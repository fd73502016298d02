"""`dsv3 checkpoint`: inspects or verifies a checkpoint, or consolidates its shards into one file."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3_lightning.common.paths import display_path, path_argument
from dsv3_lightning.common.table import si, table
from dsv3_lightning.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from dsv3_lightning.parallel.checkpoints.shard_reader import ShardReader

PIECE = 2**20  # numbers
STATES = ({"exp_avg", "exp_avg_sq", "step"}, {"momentum_buffer", "step"})  # of a parameter: AdamW's or Muon's


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action", choices=("inspect", "verify", "consolidate"), help="consolidate writes one file, usable anywhere"
    )
    parser.add_argument(
        "path", type=path_argument, metavar="CKPT", help="a file, a folder of shards, or a run's folder (its newest)"
    )
    parser.add_argument(
        "output", type=path_argument, metavar="FILE", nargs="?", help="for consolidate: the file to write"
    )


def run(action: str, path: Path, output: Path | None) -> int:
    """action: `inspect`, `verify`, or `consolidate` into the file `output`. Raises ConfigError on a bad checkpoint."""
    from dsv3_lightning.parallel.checkpoints.one_file import read_checkpoint
    from dsv3_lightning.parallel.checkpoints.opened import open_checkpoint
    from dsv3_lightning.parallel.checkpoints.shard_reader import ShardReader

    if (output is None) == (action == "consolidate"):
        raise ConfigError("checkpoint consolidate PATH FILE takes two names, inspect and verify take one")
    path = newest_of_run(path)
    if output is not None:
        state = read_checkpoint(path, mmap=True)
        consolidate(state, path, output)
        print(f"{display_path(output)}: {si(output.stat().st_size, 'B')} in one file, step {state['global_step']:,}")
        return 0
    opened = open_checkpoint(path)
    state, shards = opened.outline(), opened if isinstance(opened, ShardReader) else None
    if action == "inspect":
        print(inspected(path, state))
    else:
        print(f"{display_path(path)}: {verified(path, state, shards)}")
    return 0


def newest_of_run(path: Path) -> Path:
    """The newest good checkpoint of a run's folder; any other path is returned unchanged. Raises ConfigError."""
    from dsv3_lightning.parallel.checkpoints.names import step_files
    from dsv3_lightning.parallel.checkpoints.one_file import is_checkpoint, newest_good

    if is_checkpoint(path) or not (path / "checkpoints").is_dir():
        return path
    found = newest_good(step_files(path / "checkpoints"), thorough=False)
    if found is None:
        raise ConfigError(f"{path / 'checkpoints'}: holds no checkpoint")
    return found[0]


def inspected(path: Path, state: dict[str, Any]) -> str:
    weights = state["state_dict"]
    moments = [v for s in state["optimizer_states"] for values in s["state"].values() for v in values.values()]
    masters = [master for s in state["optimizer_states"] for master in s.get("masters", ())]
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    return table(
        [
            (display_path(path), ""),
            ("kind", "shards" if path.is_dir() else "one file"),
            ("optimizer step", f"{state['global_step']:,}"),
            ("files", f"{len(files):,}, {si(size, 'B')}"),
            ("model", described(weights.values())),
            ("the optimizer's moments", described(moments)),
            ("fp32 master weights", described(masters) if masters else "none: the weights are fp32"),
        ]
    )


def described(tensors: Any) -> str:
    tensors = list(tensors)
    kinds = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))
    return f"{len(tensors):,} tensors, {sum(t.numel() for t in tensors):,} numbers, {kinds}"


def verified(path: Path, state: dict[str, Any], shards: "ShardReader | None") -> str:
    """Reads all values and checks that they are finite, the optimizer's are all there and biases are fp32; a summary.

    state: for shards, the outline; their values are read one shard at a time. Raises ConfigError for the first fault.
    """
    import torch

    from dsv3_lightning.parallel.checkpoints.shard_reader import PREFIX

    named = named_tensors(path, state)
    for name, value in named.items():
        if name.endswith("expert_bias") and value.dtype != torch.float32:
            raise ConfigError(f"{path}: {name} is {value.dtype}, must be fp32")
        if not value.is_meta:
            check_finite(path, name, value)
    if shards:
        for shard, key in shards.parts():
            check_finite(path, key.removeprefix(PREFIX), shards.read_part(shard, key))
    return f"sound, {len(named):,} tensors read, all finite; step {state['global_step']:,}"


def named_tensors(path: Path, state: dict[str, Any]) -> "dict[str, Tensor]":
    """Tensors by their names in shards, the model's without a prefix. Raises ConfigError for missing moments."""
    named: dict[str, Tensor] = dict(state["state_dict"])
    for number, optimizer in enumerate(state["optimizer_states"]):
        indices = [index for group in optimizer["param_groups"] for index in group["params"]]
        for index in indices:
            values = optimizer["state"].get(index, {})
            if not any(kind <= values.keys() for kind in STATES):
                raise ConfigError(f"{path}: parameter {index} of the optimizer has no moments")
            named |= {f"optimizer/{number}/{index}/{what}": value for what, value in values.items()}
        masters = enumerate(optimizer.get("masters", ()))
        named |= {f"optimizer/{number}/{index}/master": value for index, value in masters}
    for owner, entries in state.get("callbacks", {}).items():
        for what, kept in entries.items():
            named |= {f"callback/{owner}/{what}/{name}": value for name, value in tensors_of(kept)}
    return named


def check_finite(path: Path, name: str, value: "Tensor") -> None:
    """Checks a tensor in pieces, as isfinite takes several times the tensor's memory. Raises ConfigError."""
    import torch

    if not all(bool(torch.isfinite(piece).all()) for piece in value.reshape(-1).split(PIECE)):
        raise ConfigError(f"{path}: {name} holds numbers that are not finite")


def tensors_of(kept: Any) -> "list[tuple[str, Tensor]]":
    """The named tensors in a callback's state."""
    import torch

    return [(name, v) for name, v in kept.items() if torch.is_tensor(v)] if isinstance(kept, dict) else []


def consolidate(state: dict[str, Any], path: Path, output: Path) -> None:
    """Writes the checkpoint as one file, as a run on one process would, with its run's tokenizer and report.

    Raises ConfigError if something is there.
    """
    from dsv3_lightning.parallel.checkpoints.one_file import AtomicCheckpointIO
    from dsv3_lightning.runs.models import CARRIED, carry, run_of

    if output.exists():
        raise ConfigError(f"{output}: already exists; choose another name")
    folder = run_of(path)
    if folder is not None:
        carry(state, folder)
    elif CARRIED not in state:
        print(f"{path}: is in no run's folder, so that {output} has no tokenizer and serves to resume from alone")
    AtomicCheckpointIO().save_checkpoint(state, output)
