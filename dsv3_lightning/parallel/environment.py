"""Environment variables that torch, NCCL and gloo read when a run starts. Imports no torch.

They are set by the run, so that they hold however it was started; one that the user has set stays as it is.
"""

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the old name, which torch still reads
RECORDER = "TORCH_FR_DUMP_TEMP_FILE"  # the start of the names of its files, which end in the rank
RECORDED = 20_000  # collectives that the flight recorder keeps: some steps' worth


def run_environment(device: str, several: bool, folder: Path, set_already: Mapping[str, str]) -> dict[str, str]:
    """The variables to set for a run. device: the type of its devices. several: whether it has more than one process.
    folder: for the flight recorder's files.

    CUDA's allocator grows segments in place of making new ones: routing changes the sizes of tensors in each step, and
    memory would fragment. With NCCL the last collectives are recorded, and written by each rank when one times out; its
    warnings are shown. Gloo, which then only gathers offloaded tensors, connects two ranks when they first exchange
    something, not all with all at the start. On CPUs it connects all at the start, since ranks without a connection
    learn late that another one has died.
    """
    wanted = {}
    if device == "cuda" and not any(name in set_already for name in ALLOCATOR):
        wanted["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if device == "cuda" and several:
        wanted |= {
            "NCCL_DEBUG": "WARN",
            "TORCH_FR_BUFFER_SIZE": str(RECORDED),
            RECORDER: str(folder / "rank_"),
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
            "TORCH_GLOO_LAZY_INIT": "1",
        }
    return {name: value for name, value in wanted.items() if name not in set_already}


def several_processes(trainer: Mapping[str, Any]) -> bool:
    """Whether a run with these settings may have more than one process."""
    return trainer["devices"] != 1 or trainer["num_nodes"] != 1


def make_folder_of(path: str | None) -> None:
    """Makes the folder that the path is in, if there is a path."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def added(environment: MutableMapping[str, str], values: Mapping[str, str]) -> Iterator[None]:
    """Sets the variables while the block runs, and in the processes that it starts."""
    environment.update(values)
    try:
        yield
    finally:
        for name in values:
            environment.pop(name, None)
