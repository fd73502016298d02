"""How long a training step waits for batches that aren't in the page cache, by number of loader workers.

Writes random tokens with log-normal document lengths, packs them, and for each number of workers drops the files from
the page cache (posix_fadvise, no root needed) and draws micro-batches in the training order. Between two micro-batches
the process sleeps for `--compute` seconds, in place of the GPU's work. Warm is the same without dropping. A cold
read costs what the file system takes for it, so run this on the one that holds the tokens:

    python benchmarks/cold_reads.py --folder /shared/tmp --gigabytes 20 --sequence-length 4096 --batch-size 2
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from dsv3_lightning.data.batches.dataset import PackedDataset
from dsv3_lightning.data.batches.index import Cut, open_index, prepare_index
from dsv3_lightning.data.batches.loader import Loader
from dsv3_lightning.data.batches.sampling import Layout, TrainSampler
from dsv3_lightning.data.text.encoding import SPLITS
from dsv3_lightning.data.text.store import FORMAT, TokenFile, TokenWriter, token_dtype, write_manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, help="where the tokens are written; default: the system's temporary folder"
    )
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of tokens")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=2, help="samples of a micro-batch")
    parser.add_argument("--median", type=int, default=500, help="length of a document, in tokens")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--compute", type=float, default=0.05, help="seconds that training takes for a micro-batch")
    parser.add_argument("--batches", type=int, default=60, help="micro-batches of a measurement")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        write_random_tokens(folder, arguments.gigabytes, arguments.median)
        prepare_index(folder, {"train": Cut(arguments.sequence_length, 1, False)})
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9
        print(f"{size:.1f} GB of tokens and index, {arguments.batch_size} samples of {arguments.sequence_length} each")
        for workers in arguments.workers:
            for cold in (True, False):
                waits, first = waiting(folder, workers, cold, arguments)
                print(
                    f"{workers} workers, {'cold' if cold else 'warm'}: waits {statistics.mean(waits) * 1e3:.2f} ms per "
                    f"micro-batch, {max(waits) * 1e3:.1f} at most; {first:.2f} s for the first"
                )


def write_random_tokens(folder: Path, gigabytes: float, median: int) -> None:
    rng, vocab_size = np.random.default_rng(0), 129_280
    files = {}
    for split in SPLITS:
        writer = TokenWriter(folder, split, vocab_size, bos_id=0, eos_id=1)
        tokens = int(gigabytes * 1e9 / 4) if split == "train" else 0
        while tokens > 0:
            document = rng.integers(vocab_size, size=int(rng.lognormal(np.log(median), 1.2)), dtype=np.uint32)
            writer.add(document)
            tokens -= len(document)
        files |= writer.close()
    write_manifest(folder, {"format": FORMAT, "dtype": token_dtype(vocab_size), "files": files})


def drop_from_cache(folder: Path) -> None:
    """Drops pages that no process has mapped and that are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def waiting(folder: Path, workers: int, cold: bool, arguments: argparse.Namespace) -> tuple[list[float], float]:
    """Seconds of waiting for each micro-batch after the first, and for the first, which starts the workers."""
    if cold:
        drop_from_cache(folder)
    length = arguments.sequence_length
    index = open_index(folder, "train", Cut(length, 1, False))
    assert index is not None
    dataset = PackedDataset(TokenFile(folder, "train"), index, length, 1, pad_id=0, mask_document_ends=False)
    sampler = TrainSampler(len(dataset), Layout(arguments.batch_size), seed=0, max_steps=arguments.batches + 1)
    loader = Loader(dataset, sampler, workers)
    times = [0.0]
    for _ in loader:
        times.append(loader.wait_seconds)
        time.sleep(arguments.compute)
    first, *waits = np.diff(times).tolist()
    return waits, first


if __name__ == "__main__":
    main()
