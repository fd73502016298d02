"""DPO and GRPO on ranks, in micro-batches, and killed: against a run in one process that was left alone.

python benchmarks/tuning.py steps             each objective on 2 ranks, DDP, FSDP2 and EP, and in micro-batches
python benchmarks/tuning.py kills [--kills 10] [--seed 0]     SIGKILL at random moments, until the run is through

`steps` prints the largest difference of a weight after two steps, relative to the largest weight of its matrix; `kills`
the tensors that differ at the end, which must be none.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("steps", "kills"))
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.parse_args()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.runs.tuning_matrix", *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
