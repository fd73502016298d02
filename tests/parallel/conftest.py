"""Several processes over gloo, each of which does several runs, so that torch is started seldom."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, Nano, Run
from tests.forking import Forked


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(
    ranks: int, folder: Path, command: list[str], per_node: int | None = None, **environment: str
) -> list[subprocess.Popen]:
    """Starts `python -m COMMAND` as torchrun would, on so many ranks, which write rank<n>.log into the folder.

    per_node: ranks of a node, of all of them by default.
    """
    node = per_node or ranks
    folder.mkdir(parents=True, exist_ok=True)
    common = os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(node),
        "TORCHELASTIC_RUN_ID": "test",
    } | environment  # fmt: skip
    processes = []
    for rank in range(ranks):
        with open(folder / f"rank{rank}.log", "w") as log:
            of_node = dict.fromkeys(("NODE_RANK", "GROUP_RANK"), str(rank // node))
            mine = common | of_node | {"RANK": str(rank), "LOCAL_RANK": str(rank % node)}
            processes.append(Forked([sys.executable, "-m", *command], env=mine, cwd=folder, stdout=log,
                                              stderr=subprocess.STDOUT))  # fmt: skip
    return processes


def on_ranks(
    ranks: int, folder: Path, command: list[str], timeout: float = 240, per_node: int | None = None, **environment: str
) -> list[str]:
    """What so many ranks wrote. Fails if one does."""
    processes = start_ranks(ranks, folder, command, per_node, **environment)
    end = time.monotonic() + timeout
    try:
        while any(process.poll() is None for process in processes):
            failed = any(process.poll() for process in processes)
            if failed or time.monotonic() > end:
                time.sleep(1.0)  # the others may say why, too
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    outputs = [(folder / f"rank{rank}.log").read_text() for rank in range(ranks)]
    codes = [process.returncode for process in processes]
    assert codes == [0] * ranks, f"exit codes {codes}\n" + "\n".join(output[-12000:] for output in outputs)
    return outputs


def runs_on_ranks(
    ranks: int, nano: Nano, runs: dict[str, tuple[str, ...]], timeout: float = 600, per_node: int | None = None
) -> list[str]:
    """Those runs (name: overrides), one after the other, on so many ranks; a busy machine needs minutes for many."""
    arguments = [nano.arguments(name, overrides) for name, overrides in runs.items()]
    folder = nano.base / f"on{ranks}-{next(iter(runs))}"
    folder.mkdir(parents=True)
    (folder / "runs.json").write_text(json.dumps(arguments))
    return on_ranks(ranks, folder, ["tests.parallel.worker", str(folder / "runs.json")], timeout, per_node)


SAMPLES = [f"callbacks.sample_text.{setting}" for setting in ("every_n_steps=20", "temperature=0", "max_new_tokens=8")]


@pytest.fixture(scope="module")
def shared_nano(tmp_path_factory: pytest.TempPathFactory, data_cache: list[str]) -> Nano:
    """As `nano`, for all tests of a file."""
    from tests.conftest import QUIET

    return Nano(tmp_path_factory.mktemp("nano"), [*data_cache, *QUIET, *SAMPLES])


def under_torchrun(
    nano: Nano, name: str, words: tuple[str, ...], ranks: int = 2, restarts: int = 3, timeout: float = 300
) -> Run:
    """A run whose ranks torchrun starts, and starts again when one has died."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
               f"--max-restarts={restarts}", "-m", "dsv3_lightning", *nano.arguments(name, words)]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with Forked(command, cwd=nano.base, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=environment) as process:  # fmt: skip
        try:
            output, errors = process.communicate(timeout=timeout)
        finally:
            process.kill()
    return Run(nano.base / "runs" / name, process.returncode, output + errors)
