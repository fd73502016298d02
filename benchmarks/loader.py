"""Data loading speed: tokens per second of training batches without a training step.

Writes random tokens with log-normal document lengths into a temporary folder, packs them, and loads batches in the
training order for some seconds, several times, on one thread. Tokens are the T positions that the model reads;
gathering, padding, targets of all heads and counts are included, and the file is in the page cache.

    python benchmarks/loader.py --sequence-length 4096 --batch-size 4 --workers 2
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from dsv3_lightning.data.batches.dataset import PackedDataset
from dsv3_lightning.data.batches.loader import Loader
from dsv3_lightning.data.batches.packing import pack
from dsv3_lightning.data.batches.sampling import Layout, TrainSampler
from dsv3_lightning.data.text.store import FORMAT, TokenFile, TokenWriter, token_dtype, write_manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--mtp-depth", type=int, default=1)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--median", type=int, default=500, help="length of a document, in tokens")
    parser.add_argument("--workers", type=int, default=0, help="loader processes; 0: in the process itself")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each repeat")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        write_random_tokens(Path(name), arguments.documents, arguments.median, arguments.vocab_size)
        file = TokenFile(Path(name), "train")
        start = time.perf_counter()
        length, depth = arguments.sequence_length, arguments.mtp_depth
        index = pack(file.offsets(), length, depth)
        packed = time.perf_counter() - start
        dataset = PackedDataset(file, index, length, depth, pad_id=0, mask_document_ends=False)
        rates = [measure(dataset, arguments) for _ in range(arguments.repeats)]
    filled, rate = len(file.tokens) / len(index) / (length + 1), statistics.median(rates) / 1e6
    spread = f"median of {arguments.repeats}; {min(rates) / 1e6:.1f} to {max(rates) / 1e6:.1f}"
    print(f"{arguments.documents} documents, {len(file.tokens) / 1e6:.1f} M tokens, packed in {packed:.2f} s")
    print(f"{len(index)} samples of {length + 1} places, {filled:.2%} filled")
    print(f"{rate:.1f} M tokens/s ({spread})")


def write_random_tokens(folder: Path, documents: int, median: int, vocab_size: int) -> None:
    rng = np.random.default_rng(0)
    writer = TokenWriter(folder, "train", vocab_size, bos_id=0, eos_id=1)
    for size in rng.lognormal(np.log(median), 1.2, documents).astype(int):
        writer.add(rng.integers(vocab_size, size=size))
    write_manifest(folder, {"format": FORMAT, "dtype": token_dtype(vocab_size), "files": writer.close()})


def measure(dataset: PackedDataset, arguments: argparse.Namespace) -> float:
    """Tokens per second from the second batch on, so the start of processes isn't included."""
    sampler = TrainSampler(len(dataset), Layout(arguments.batch_size), seed=0, max_steps=1_000_000)
    batches = iter(Loader(dataset, sampler, arguments.workers))
    next(batches)
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < arguments.seconds:
        next(batches)
        count += 1
    return count * arguments.batch_size * arguments.sequence_length / elapsed


if __name__ == "__main__":
    main()
