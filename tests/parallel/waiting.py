"""Two ranks of which the second waits for the first one, longer than any time limit of the store by which they meet.

python -m tests.parallel.waiting works|dies: what the first rank does after two seconds.
"""

import os
import sys
import time
from datetime import timedelta

from dsv3_lightning.errors import RunStopped
from dsv3_lightning.parallel import meeting

if __name__ == "__main__":
    meeting.GIVE_UP_AFTER = timedelta(seconds=1)
    rank = int(os.environ["RANK"])
    first = meeting.FirstRank(meeting.Meeting(rank, 1), "run")

    def decide() -> str:
        time.sleep(2)
        if sys.argv[1] == "dies":
            os._exit(0)
        return "prepared"

    try:
        print("heard", first.decides("data", decide, "prepares"), flush=True)
        first.wait_for_others("data", seconds=10)
    except RunStopped as error:
        print("stopped", error, flush=True)
