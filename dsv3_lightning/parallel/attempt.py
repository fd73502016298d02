"""A name for each start of all ranks, where they meet in a store of torchrun, which lives longer than they do.

torchrun counts restarts by node (TORCHELASTIC_RESTART_COUNT): a node whose ranks are still healthy when it hears that
those of another node failed doesn't count that restart (`_invoke_run` of torch's agent, 2.13). So the first rank draws
a name, and tells it to every rank that asks.
"""

import threading
import uuid
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

LONGEST = timedelta(days=30)
QUESTIONS = "ranks that ask for the name of this attempt"


def name_of_attempt(store: dist.TCPStore, rank: int, within: timedelta) -> str:
    """The same on all ranks, and another one in each start. Raises DistError if the first rank doesn't answer."""
    drawn = uuid.uuid4().hex
    if rank == 0:
        threading.Thread(target=answer, args=(store.host, store.port, drawn), daemon=True).start()
        return drawn
    store.queue_push(QUESTIONS, drawn)
    store.wait([drawn], within)
    return store.get(drawn).decode()


def answer(host: str, port: int, name: str) -> None:
    """Tells the name to all that ask, ranks of earlier starts included, whom it doesn't reach any more."""
    with suppress(dist.DistError):  # the store is gone, and with it everyone who might ask
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=LONGEST)
        while True:
            store.set(store.queue_pop(QUESTIONS).decode(), name)
