"""Comparison of LaTeX by math-verify, in a process with limits of its own. Imports no torch.

sympy can compute for hours on a short line, so each comparison has a limit of processor time, which waiting doesn't
use up, and of memory. No signal is used in this process, so any thread may call. A comparison that exceeds a limit, or
fails in any way, is unreadable, and the next one has a new process.
"""

import atexit
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Literal

from dsv3_lightning.common.children import end, readable_within
from dsv3_lightning.errors import ConfigError

SECONDS = 5  # of processor time, per comparison
PATIENCE = 60  # seconds of waiting for a comparison that uses no processor time either
Verdict = Literal["right", "wrong", "unreadable"]
VERDICTS: dict[str, Verdict] = {"right": "right", "wrong": "wrong", "unreadable": "unreadable"}


class MathChecker:
    """A process that compares LaTeX, started when first used. seconds: processor time of one comparison."""

    def __init__(self, seconds: int = SECONDS) -> None:
        self.seconds = seconds
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()

    def same(self, answer: str, expected: str) -> Verdict:
        """Whether the answer means what is expected. One comparison at a time, in the order of the calls."""
        with self.lock:
            process = self.started()
            assert process.stdin is not None
            verdict = ""
            try:
                process.stdin.write(json.dumps([answer, expected]).encode() + b"\n")
                process.stdin.flush()
                verdict = self.line(process, PATIENCE * self.seconds)
            except BrokenPipeError:
                pass  # the process has died: the verdict stays empty
            if verdict not in VERDICTS:
                self.stop()
            return VERDICTS.get(verdict, "unreadable")

    def started(self) -> subprocess.Popen[bytes]:
        """The running process, which has imported its libraries. Raises ConfigError where it can't start."""
        if self.process is not None and self.process.poll() is None:
            return self.process
        check_library()
        command = [sys.executable, "-m", "dsv3_lightning.evaluation.latex_worker", str(self.seconds)]
        package = str(Path(__file__).parents[2])  # found from any working folder
        paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=os.environ | {"PYTHONPATH": paths},
        )
        if self.line(self.process, 10 * PATIENCE) != "ready":
            self.stop()
            raise ConfigError(f"the process that compares LaTeX did not start; see what `{' '.join(command)}` prints")
        return self.process

    def line(self, process: subprocess.Popen[bytes], seconds: float) -> str:
        """The next line from the process; empty if it ends or none comes in time."""
        assert process.stdout is not None
        return process.stdout.readline().decode().strip() if readable_within(process.stdout, seconds) else ""

    def stop(self) -> None:
        """Ends the process; the next comparison starts another."""
        if self.process is not None:
            end(self.process)
            self.process = None


def check_library() -> None:
    """Raises ConfigError where math-verify isn't installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigError("checker 'math': needs math-verify; pip install 'dsv3-lightning[eval]'")


SHARED = MathChecker()
atexit.register(SHARED.stop)


def same_expression(answer: str, expected: str) -> Verdict:
    """Whether the answer means what is expected, by the one process that all callers share. Raises ConfigError."""
    return SHARED.same(answer, expected)


def squeezed(text: str) -> str:
    """The LaTeX without space and size, for comparing two texts; numbers stay apart."""
    text = re.sub(r"\\(?:left|right|displaystyle)(?![A-Za-z])|(?<!\\)\\[!,;: ]|[\s~$]", " ", text)
    text = re.sub(r"(?<![0-9]) +| +(?![0-9])", "", text)
    return re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", text).removesuffix(".")
