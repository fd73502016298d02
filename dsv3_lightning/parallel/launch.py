"""Detection of the launcher, rank and number of processes from environment variables. Imports no torch.

Lightning's Trainer reads the same variables in the same order (torchrun, srun, jsrun, MPI, then LOCAL_RANK and
NODE_RANK), but some of its readers trust a single one of them. Variables left over from another launcher are ignored
where Lightning ignores them, and refused by name where it doesn't.
"""

import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dsv3_lightning.errors import ConfigError

Environment = Mapping[str, str]


@dataclass(frozen=True)
class Launcher:
    """The names of a launcher's variables. mark: a variable that is set only in processes that it starts."""

    name: str
    mark: str
    rank: str
    size: str
    local_rank: str
    local_size: str = ""
    nodes: str = ""


TORCHRUN = Launcher("torchrun", "TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SRUN = Launcher("srun", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", nodes="SLURM_NNODES")
JSRUN = Launcher(
    "jsrun", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK",
    "JSM_NAMESPACE_LOCAL_SIZE",
)  # fmt: skip
MPI = (
    Launcher(
        "mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher("mpiexec", "PMI_SIZE", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)  # fmt: skip
BY_HAND = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "GROUP_RANK")


@dataclass(frozen=True)
class Launch:
    """How this process was started. launcher: None if processes are started by hand or by Lightning.

    size: the number of all processes, None if the environment doesn't say. local_size: the same for a node. node: the
    node's number. rank: None if it follows from node, devices per node and local_rank.
    """

    launcher: Launcher | None = None
    size: int | None = None
    local_size: int | None = None
    rank: int | None = None
    local_rank: int = 0
    node: int = 0


def find_launch(environment: Environment) -> Launch:
    """The launch that the environment describes. Raises ConfigError for invalid or incomplete variables."""
    for launcher in (TORCHRUN, SRUN, JSRUN, *MPI):
        for name in (launcher.rank, launcher.size, launcher.local_rank, launcher.local_size, launcher.nodes):
            number(environment, name)
    node = number(environment, "NODE_RANK", number(environment, "GROUP_RANK", 0))
    for launcher in (TORCHRUN, SRUN, JSRUN, *MPI):
        if launcher.mark in environment and not interactive(launcher, environment):
            launch = complete(launcher, environment)
            if launcher in MPI and launch.size == 1:
                continue  # Lightning tries the next one
            return launch
    local_rank, size = number(environment, "LOCAL_RANK"), number(environment, "WORLD_SIZE")
    if local_rank is not None:
        return Launch(size=size, local_rank=local_rank, node=node or 0)
    if "RANK" in environment and (size or 1) > 1:
        raise ConfigError(
            f"RANK={environment['RANK']}, WORLD_SIZE={size}: LOCAL_RANK is not set; without it each process would "
            "consider itself the only one; start by torchrun, or unset them"
        )
    return Launch(node=node or 0)


def interactive(launcher: Launcher, environment: Environment) -> bool:
    """True in an interactive SLURM shell, where Lightning ignores the number of tasks."""
    return launcher is SRUN and environment.get("SLURM_JOB_NAME") in ("bash", "interactive")


def complete(launcher: Launcher, environment: Environment) -> Launch:
    """The launch, from a complete and consistent set of the launcher's variables. Raises ConfigError."""
    shown = f"{launcher.mark}={environment[launcher.mark]}"
    size, rank = number(environment, launcher.size), number(environment, launcher.rank)
    if size == 1 and launcher.mark == launcher.size and rank is None:
        rank = 0
    needed = [launcher.size, launcher.rank]
    if (size or 0) > 1:
        needed.append(launcher.local_rank)
        needed += {TORCHRUN: ["MASTER_ADDR", "MASTER_PORT"], SRUN: ["SLURM_NODEID", "SLURM_NTASKS_PER_NODE"]}.get(
            launcher, []
        )
    for name in needed:
        if name not in environment and not (name == launcher.rank and rank == 0):
            raise ConfigError(f"{shown}: is {launcher.name}'s, but {name} is not set; unset it, or use {launcher.name}")
    assert size is not None and rank is not None
    if size > 1 and launcher in MPI and importlib.util.find_spec("mpi4py") is None:
        raise ConfigError(
            f"{shown}: {launcher.name} started {size} processes, which Lightning finds by the package mpi4py alone; "
            "install it, start by torchrun or srun, or unset the variable"
        )
    if rank >= size:
        raise ConfigError(f"{launcher.rank}={rank}: {launcher.size}={size} has no such rank; unset both")
    nodes = number(environment, launcher.nodes) or 1
    local_size = number(environment, launcher.local_size) or size // nodes
    return Launch(launcher, size, local_size, rank, number(environment, launcher.local_rank, 0) or 0)


def number(environment: Environment, name: str, default: int | None = None) -> int | None:
    """The variable's value. Raises ConfigError unless it is a whole number of at least 0; Lightning fails at import."""
    text = environment.get(name)
    if text is None:
        return default
    if not text.strip().isdecimal():
        raise ConfigError(f"{name}={text!r}: must be a whole number of at least 0, or unset")
    return int(text)


def fill_in(trainer: dict[str, Any], environment: Environment) -> dict[str, Any]:
    """The trainer's settings with null `devices` and `num_nodes` replaced by the launcher's numbers, or by 1.

    `devices: auto` is replaced by the launcher's as well; without a launcher Lightning detects the devices.
    """
    launch = find_launch(environment)
    devices, nodes = trainer["devices"], trainer["num_nodes"]
    per_node = launch.local_size
    if nodes is None:
        nodes = max(1, launch.size // per_node) if launch.size and per_node else 1
    if launch.size is not None and per_node is None:
        per_node = max(1, launch.size // nodes)
    if devices is None or (devices == "auto" and per_node is not None):
        devices = per_node or 1
    return trainer | {"devices": devices, "num_nodes": nodes}


def rank_of(trainer: dict[str, Any], environment: Environment) -> int:
    """This process's rank in the Trainer. Raises ConfigError if environment and settings contradict each other."""
    launch, nodes, devices = find_launch(environment), trainer["num_nodes"], trainer["devices"]
    devices = len(devices) if isinstance(devices, list) else devices
    if isinstance(devices, str) or devices < 1:
        return launch.rank or 0  # depends on the machine's devices
    shown, size = f"trainer.devices={devices} x trainer.num_nodes={nodes}", devices * nodes
    if launch.launcher is not None:
        if size != launch.size:
            name = launch.launcher.size
            raise ConfigError(
                f"{shown}: {launch.launcher.name} has started {name}={launch.size} processes; leave both settings out "
                f"to take its numbers, or unset {name} if this process is a single one"
            )
        assert launch.rank is not None
        return launch.rank
    if launch.local_rank >= devices:
        raise ConfigError(
            f"LOCAL_RANK={launch.local_rank}: {shown} has no such process on a node; unset it, or set both"
        )
    if launch.node >= nodes:
        name = "NODE_RANK" if "NODE_RANK" in environment else "GROUP_RANK"
        raise ConfigError(f"{name}={launch.node}: {shown} has no such node; unset it, or set trainer.num_nodes")
    rank = launch.node * devices + launch.local_rank
    if launch.size not in (None, size):
        raise ConfigError(
            f"WORLD_SIZE={launch.size}: {shown} are {size} processes; unset it, or leave both settings out"
        )
    if size > 1 and number(environment, "RANK", rank) != rank:
        raise ConfigError(f"RANK={environment['RANK']}: by NODE_RANK and LOCAL_RANK this is rank {rank}; unset it")
    if nodes > 1 or (size > 1 and "LOCAL_RANK" in environment):
        for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if nodes > 1 else ("MASTER_PORT",):
            if name not in environment and not (name == "NODE_RANK" and "GROUP_RANK" in environment):
                reason = f"LOCAL_RANK={launch.local_rank}" if "LOCAL_RANK" in environment else shown
                raise ConfigError(f"{reason}: {name} is not set, so the processes can't find each other; use torchrun")
    return rank


def delay_other_ranks(environment: Environment, seconds: float = 3.0) -> None:
    """Delays other ranks' errors: all ranks have the same one, and launchers stop them once the first has ended."""
    try:
        launch = find_launch(environment)
    except ConfigError:
        return
    if (launch.rank if launch.rank is not None else launch.local_rank + launch.node) > 0:
        time.sleep(seconds)


@contextmanager
def notice_after(seconds: float, line: str, unless: Callable[[], bool]) -> Iterator[None]:
    """Prints the line if `unless` is still false after `seconds`, while the block waits."""
    timer = threading.Timer(seconds, lambda: None if unless() else print(line, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


LEFT_BY_LIGHTNING = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")


@contextmanager
def put_back(environment: MutableMapping[str, str]) -> Iterator[None]:
    """Restores the environment: a second run would mistake variables that Lightning sets for a launcher's."""
    missing = [name for name in LEFT_BY_LIGHTNING if name not in environment]
    try:
        yield
    finally:
        for name in missing:
            environment.pop(name, None)
