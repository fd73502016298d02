"""Sharded checkpoints: what lies where in them.

A checkpoint is a folder with the name that a file would have: `shards/` holds every tensor in the format of
torch.distributed.checkpoint, `rest.pt` everything else. It is written under a temporary name and renamed once all ranks
are done, so it is never incomplete. Names of tensors don't depend on ranks: `model/<name>`,
`optimizer/<number>/<parameter>/<what>`, and `callback/<its key>/<what>/<parameter's name>` for what a callback stores
for parameters.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def write(content: dict[str, Any], path: Path) -> None:
    """Writes a file for torch.load. Raises OSError, or torch's error for it."""
    with open(path, "wb") as file:  # given a path, torch would hide the system's error
        torch.save(content, file)


def split(checkpoint: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors that are no scalars, by name, and the rest of the checkpoint."""
    tensors = {f"model/{name}": value for name, value in checkpoint["state_dict"].items()}
    optimizers = []
    for number, state in enumerate(checkpoint["optimizer_states"]):
        named = {(index, what): v for index, values in state["state"].items() for what, v in values.items()}
        named |= {(index, "master"): master for index, master in enumerate(state.get("masters", ()))}
        tensors |= {f"optimizer/{number}/{index}/{what}": v for (index, what), v in named.items() if v.dim()}
        scalars: dict[int, dict[str, Tensor]] = {index: {} for index in state["state"]}
        for (index, what), value in named.items():
            if not value.dim():
                scalars[index][what] = value
        optimizers.append({"state": scalars, "param_groups": state["param_groups"]})
    callbacks = {}
    for owner, state in checkpoint.get("callbacks", {}).items():
        parts = {what: v for what, v in state.items() if isinstance(v, dict) and any(map(is_sharded, v.values()))}
        tensors |= {f"callback/{owner}/{what}/{name}": v for what, named in parts.items() for name, v in named.items()}
        callbacks[owner] = state | {what: {} for what in parts}
    return tensors, {**checkpoint, "state_dict": {}, "optimizer_states": optimizers, "callbacks": callbacks}


def is_sharded(value: Any) -> bool:
    return isinstance(value, DTensor)


def join(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint that `split` took apart."""
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "model":
            rest["state_dict"][name] = value
            continue
        owner, index, what = name.split("/")
        if kind == "callback":
            rest["callbacks"][owner][index][what] = value
            continue
        state = rest["optimizer_states"][int(owner)]
        if what == "master":
            state.setdefault("masters", {})[int(index)] = value
        else:
            state["state"][int(index)][what] = value
    for state in rest["optimizer_states"]:
        if "masters" in state:
            state["masters"] = [master for _, master in sorted(state["masters"].items())]
    return rest
