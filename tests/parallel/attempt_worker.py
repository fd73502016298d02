"""One of two ranks under a launcher whose store lives on: python -m tests.parallel.attempt_worker START COUNT.

COUNT: how often the launcher of the first rank's node says that it was restarted; that of the other node says 0.
"""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from dsv3_lightning.parallel.groups import init_in_launchers_store
from dsv3_lightning.parallel.meeting import FirstRank, Meeting

if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    os.environ["TORCHELASTIC_RESTART_COUNT"] = sys.argv[2] if rank == 0 else "0"
    first = FirstRank(Meeting(rank, 1), "run")
    print("heard", first.decides("start", lambda: sys.argv[1], "chooses"), flush=True)
    init_in_launchers_store(first.attempt, "gloo", timedelta(seconds=60), torch.device("cpu"))
    total = torch.ones(1)
    dist.all_reduce(total)
    print("ranks", int(total), flush=True)
