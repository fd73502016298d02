"""One rank that opens a run's folder, of which it may see an old listing, and prints what it starts from
and of which files it compares every byte with the checksum.

python -m tests.parallel.opening RANK FILE FOLDER: on that rank, checkpoints are those that FILE lists.
"""

import json
import os
import sys
from pathlib import Path
from zipfile import ZipFile

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check, to_tree
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.parallel.meeting import FirstRank, meeting
from dsv3_lightning.runs.fit import open_run
from dsv3_lightning.runs.record import RunFolder
from tests.parallel.stale import see_old_listings

if __name__ == "__main__":
    stale, listing, folder = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    rank_zero_only.rank = int(os.environ["RANK"])
    if rank_zero_only.rank == stale:
        see_old_listings(json.loads(listing.read_text()))
    checksum = ZipFile.testzip
    ZipFile.testzip = lambda file: print("checksum of", file.filename, flush=True) or checksum(file)
    for name in folder.iterdir():
        settings = [f"run.dir={folder}", f"run.name={name.name}", "trainer.devices=2", "trainer.max_steps=8"]
        config = check(compose(["nano"], settings).tree)
        try:
            run = RunFolder(config)
            first = FirstRank(meeting(config.trainer, rank_zero_only.rank), str(run.path))
            found = open_run(first, run, to_tree(config))
            print(name.name, found.finished, found.checkpoint and found.checkpoint[1], found.precision, flush=True)
        except ConfigError as error:
            print(name.name, "refused", error, flush=True)
