"""Decisions of the first rank for all, before there is a process group, through the store by which ranks meet.

A rank that looked for itself would see its own node's view of the file system, and on NFS or Lustre that may be an old
listing of a folder.
"""

import json
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from dsv3_lightning.errors import ConfigError, RunStopped
from dsv3_lightning.parallel.attempt import LONGEST, name_of_attempt
from dsv3_lightning.parallel.launch import find_launch, notice_after

GIVE_UP_AFTER = timedelta(minutes=30)  # until the first rank is there; it may then work for as long as it needs
STORES: dict[tuple[str, int], dist.TCPStore] = {}  # they live as long as the process: other ranks may ask later
ATTEMPTS: dict[tuple[str, int], str] = {}  # the name of this process's start in a store of torchrun
MET: Counter[tuple[str, int, str]] = Counter()  # a process may do several runs, and one run several times


class Meeting(NamedTuple):
    """A rank, and how many others ask the first one before it begins to train; more may follow."""

    rank: int
    others: int


def meeting(trainer: dict[str, Any], rank: int) -> Meeting | None:
    """None for a run of one process. Of ranks that Lightning will start, only the first of each node asks at once."""
    launch, nodes = find_launch(os.environ), trainer["num_nodes"]
    devices = trainer["devices"]
    devices = len(devices) if isinstance(devices, list) else devices
    if launch.launcher is not None:
        assert launch.size is not None
        return Meeting(rank, launch.size - 1) if launch.size > 1 else None
    if devices == nodes == 1:
        return None
    all_are_here = "LOCAL_RANK" in os.environ and isinstance(devices, int)
    return Meeting(rank, nodes * devices - 1 if all_are_here else nodes - 1)


class FirstRank:
    """Passes decisions of the first rank to all ranks of a run. Every rank creates one.

    about: the run. Raises RunStopped where the first rank can't be reached. Lightning's process group uses the same
    address, and within a process the same server. torchrun's store survives a restart, so names in it contain that of
    the attempt, which is None elsewhere.
    """

    def __init__(self, who: Meeting | None, about: str) -> None:
        self.who, agent = who, os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.attempt = uuid.uuid4().hex if agent else None
        if who is None:
            return
        here = cluster()
        address = here.main_address, here.main_port
        os.environ["MASTER_PORT"] = str(address[1])  # else Lightning chooses another one
        self.to_hear = 0 if agent else who.others  # torchrun's store doesn't end with this process
        try:
            if address not in STORES:
                STORES[address] = dist.TCPStore(
                    *address, is_master=who.rank == 0 and not agent, timeout=GIVE_UP_AFTER, wait_for_workers=False,
                    multi_tenant=True,
                )  # fmt: skip
            if agent:
                if address not in ATTEMPTS:
                    ATTEMPTS[address] = name_of_attempt(STORES[address], who.rank, who.others + 1, GIVE_UP_AFTER)
                self.attempt = ATTEMPTS[address]
        except dist.DistError as error:
            raise RunStopped(f"rank {who.rank} stops: no answer from {address[0]}:{address[1]} ({error})") from error
        MET[(*address, about)] += 1
        self.store = dist.PrefixStore(f"{about} {self.attempt} {MET[(*address, about)]}", STORES[address])

    def decides(self, what: str, decide: Callable[[], Any], doing: str) -> Any:
        """Returns on every rank what `decide` returns on the first, which must be JSON; its errors are raised on all.

        The others wait outside of any process group, and so without its time limit, for as long as the first rank's
        process exists. what: a name for it. doing: what the first rank does, for the line that says who waits.
        """
        if self.who is None:
            return decide()
        if self.who.rank > 0:
            return self.ask(what, self.who.rank)
        try:
            line = f"{self.who.others} ranks wait for the first one, which {doing}"
            with notice_after(20.0, line, unless=lambda: False):
                decided = decide()
        except Exception as error:
            told = {"error": str(error), "for_users": isinstance(error, ConfigError)}
            self.store.set(what, json.dumps(told))
            self.wait_for_others(what, seconds=3)
            raise
        self.store.set(what, json.dumps({"decided": decided}))
        return decided

    def ask(self, what: str, rank: int) -> Any:
        try:
            self.store.wait([what], LONGEST)
            told = json.loads(self.store.get(what))
            self.store.add(f"heard {what}", 1)
        except dist.DistError as error:
            raise RunStopped(f"rank {rank} stops: the first rank is gone ({error})") from error
        if "error" in told:
            raise (ConfigError if told["for_users"] else RunStopped)(told["error"])
        return told["decided"]

    def wait_for_others(self, what: str, seconds: float) -> None:
        """Waits on the first rank, which is about to end, until the others have received its decision."""
        end = time.monotonic() + seconds
        while self.who is not None and self.who.rank == 0 and time.monotonic() < end:
            if self.store.add(f"heard {what}", 0) >= self.to_hear:
                return
            time.sleep(0.05)


def refuse_mixed_steps(steps: list[int]) -> None:
    """Raises RunStopped where ranks have loaded different steps. steps: by rank.

    >>> refuse_mixed_steps([40, 40, 20, 40])
    Traceback (most recent call last):
    dsv3_lightning.errors.RunStopped: the ranks loaded different steps: 20 on rank 2; 40 on ranks 0, 1, 3
    """
    if len(set(steps)) <= 1:
        return
    found = []
    for step in sorted(set(steps)):
        ranks = [str(rank) for rank, other in enumerate(steps) if other == step]
        shown = ", ".join(ranks[:8]) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
        found.append(f"{step} on rank{'s' * (len(ranks) > 1)} {shown}")
    raise RunStopped(f"the ranks loaded different steps: {'; '.join(found)}")


def cluster() -> ClusterEnvironment:
    """Where the ranks meet, as Lightning finds it."""
    kinds: tuple[type[ClusterEnvironment], ...] = (
        TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment,
    )  # fmt: skip
    return next((kind() for kind in kinds if kind.detect()), LightningEnvironment())
