"""A name for each start of all ranks, where they meet in a store of torchrun, which lives longer than they do.

torchrun counts restarts by node (TORCHELASTIC_RESTART_COUNT): a node whose ranks are still healthy when it hears that
those of another node failed doesn't count that restart (`_invoke_run` of torch's agent, 2.13). So the first rank draws
a name, and tells it to every rank that asks.
"""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

LONGEST = timedelta(days=30)
QUESTIONS = "ranks that ask for the name of this attempt"
PAUSE = 0.02  # seconds between two looks for a question


def name_of_attempt(store: dist.TCPStore, rank: int, ranks: int, within: timedelta) -> str:
    """The same on all ranks, and another one in each start; all of them must call it.

    Raises DistError if the first rank doesn't answer, and on the first rank if others don't ask.
    """
    drawn = uuid.uuid4().hex
    if rank == 0:
        answer_all(store, drawn, ranks - 1, within)
        return drawn
    store.queue_push(QUESTIONS, drawn)
    store.wait([drawn], within)
    name = store.get(drawn).decode()
    store.add(f"heard {name}", 1)
    return name


def answer_all(store: dist.TCPStore, name: str, others: int, within: timedelta) -> None:
    """Tells the name to all that ask, until as many ranks have heard it; those of earlier starts don't count."""
    end = time.monotonic() + within.total_seconds()
    while store.add(f"heard {name}", 0) < others:
        try:
            store.set(store.queue_pop(QUESTIONS, block=False).decode(), name)
        except dist.QueueEmptyError:
            if time.monotonic() > end:
                raise dist.DistStoreError(f"not all of {others} ranks have asked within {within}") from None
            time.sleep(PAUSE)
