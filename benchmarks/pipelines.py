"""Pipelines against one process: every gradient, every resume, and ranks that die in every kind of action.

python benchmarks/pipelines.py gradients [--steps 20] [--only TEXT]    two and four stages, schedules, models
python benchmarks/pipelines.py resume                                  1, 2 and 4 stages, FSDP2, EP and one process
python benchmarks/pipelines.py kills [--ranks 2]                       each kind of action, then under torchrun

Prints a Markdown table. The runs are those of tests/parallel/pipeline, where a subset is a test; all take an hour.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("gradients", "resume", "kills"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", default="", help="only cases whose name has this")
    parser.add_argument("--ranks", type=int, default=2)
    parser.parse_args()
    command = [sys.executable, "-m", "tests.parallel.pipeline.matrix", *sys.argv[1:]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
