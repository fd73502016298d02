"""The order of the samples: microseconds per position, and the memory that it takes.

Every rank computes the positions of its own samples of a step, at once. The command also gives the process's memory
before and after, which a stored order of as many samples would raise by 8 bytes for each.

    python benchmarks/order.py --samples 3_600_000_000
"""

import argparse
import resource
import statistics
import time

import numpy as np

from dsv3_lightning.data.batches.permutation import permuted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=3_600_000_000, help="default: 14.8 T tokens in samples of 4,096")
    parser.add_argument("--repeats", type=int, default=200)
    arguments = parser.parse_args()
    count, rng = arguments.samples, np.random.default_rng(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    alone = [seconds(int(position), count) for position in rng.integers(count, size=arguments.repeats)]
    print(f"{count:,} samples; one position alone: {statistics.median(alone) * 1e6:.1f} µs")
    for at_once in (8, 60, 15_360):
        times = [seconds(rng.integers(count, size=at_once), count) for _ in range(arguments.repeats)]
        whole = statistics.median(times) * 1e6
        print(f"{at_once:,} at once: {whole:,.0f} µs, {whole / at_once:.2f} µs each")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"memory of the process at its peak: {before / 1024:.1f} MiB before, {after / 1024:.1f} MiB after")


def seconds(positions: int | np.ndarray, count: int) -> float:
    start = time.perf_counter()
    permuted(positions, count, seed=1, epoch=0)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
