"""How the processes that write the shards of a checkpoint agree on its end, through the store by which ranks have met.

A store has one connection per process, where a process group of gloo may have one per pair of them.
"""

import json
import time
from collections.abc import Iterable
from datetime import timedelta

import torch.distributed as dist

from dsv3_lightning.parallel.checkpoints.jobs import Failure, WriterGroup

FIRST_LOOK, LAST_LOOK = 0.01, 1.0  # seconds between two looks for what was said
ANSWERS_WITHIN = timedelta(minutes=1)  # a request that waits for no other rank
CONNECTS_WITHIN = timedelta(seconds=10)  # to a store that is there, or gone with the first rank; torch tries it twice
FAILED = "failed"


class RankFailed(Exception):
    """A rank will not write its shards."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(*failure)
        self.failure = failure


class Late(Exception):
    """So much was not said in time. names: of what."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(names)
        self.names = names


class Agreement:
    """What the writers of a run tell each other. connected: the store, if this process has it; else it connects."""

    def __init__(
        self, group: WriterGroup, timeout: timedelta = ANSWERS_WITHIN, connected: dist.Store | None = None
    ) -> None:
        self.group = group
        store = connected or dist.TCPStore(
            group.host, group.port, is_master=False, wait_for_workers=False, timeout=min(timeout, CONNECTS_WITHIN)
        )
        if connected is None:
            store.set_timeout(timeout)
        self.run: dist.Store = dist.PrefixStore(group.name, store)

    def say(self, name: str, word: bytes = b"") -> None:
        self.run.set(name, word)  # type: ignore[arg-type]  # the stub has text alone

    def hear(self, names: list[str], within: timedelta | None = None) -> list[bytes]:
        """What was said under these names, once all of them were. Raises RankFailed and, after `within`, Late."""
        begun, pause = time.monotonic(), FIRST_LOOK
        while not self.run.check(names):  # a wait with a time limit would print a warning at each end
            if self.run.check([FAILED]):
                raise RankFailed(Failure(*json.loads(self.run.get(FAILED))))
            if within is not None and time.monotonic() - begun > within.total_seconds():
                raise Late([name for name in names if not self.run.check([name])])
            time.sleep(pause)
            pause = min(2 * pause, LAST_LOOK)
        return self.run.multi_get(names)

    def fail(self, reason: str | None) -> None:
        """Says to all ranks that this one will not write what they wait for. reason: as in Failure."""
        self.say(FAILED, json.dumps([self.group.rank, reason]).encode())

    def forget(self, names: Iterable[str]) -> None:
        for name in names:
            self.run.delete_key(name)
