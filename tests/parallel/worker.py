"""One rank: several runs one after the other in the same process, since starting torch takes longer than a run.

python -m tests.parallel.worker FILE, where FILE holds a JSON list of argument lists for the command line. Each must
end well; the last may stop early.
"""

import json
import sys

import torch

from dsv3_lightning.cli import main
from tests.conftest import blank_figures


def work(path: str) -> int:
    torch.set_num_threads(1)
    with open(path) as file:
        runs = json.load(file)
    for number, arguments in enumerate(runs, start=1):
        with blank_figures():
            code = main(arguments)
        if code and not (code == 1 and number == len(runs)):
            return code
    return 0


if __name__ == "__main__":
    code = work(sys.argv[1])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(code)
