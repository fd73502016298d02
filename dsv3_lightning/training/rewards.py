"""Calls of reward functions in a process of their own with a time limit. A failure is one line naming the function."""

import contextlib
import math
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from dsv3_lightning.common.children import end, readable_within
from dsv3_lightning.errors import ConfigError, RunStopped
from dsv3_lightning.training.reward_worker import LENGTH, send

SETTINGS = ("grpo.rewards", "grpo.reward_seconds")


class RewardFailed(RunStopped):
    """A reward function that raised, took too long, or returned something else than a number or None per answer."""


class Rewards:
    """Reward functions module:name, called as TRL's are. seconds: the limit of a call. settings: what sets the two.

    The process starts with the first call, and again after a failure. Raises RewardFailed.
    """

    def __init__(self, names: Sequence[str], seconds: float, settings: tuple[str, str] = SETTINGS) -> None:
        self.names, self.seconds, self.settings = list(names), seconds, settings
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self, arguments: dict[str, Any], answers: int) -> list[list[float]]:
        """The rewards of each function, a number per answer, NaN for None. arguments: by name, lists of `answers`."""
        return self.request(arguments, answers)

    def check(self) -> None:
        """Raises ConfigError for a function that can't be imported."""
        try:
            self.request(None, 0)
        except RewardFailed as failure:
            raise ConfigError(str(failure)) from None

    def request(self, arguments: dict[str, Any] | None, answers: int) -> list[list[float]]:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dsv3_lightning.training.reward_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # Ctrl-C lets the run finish its step
            )
        try:
            assert self.process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # what is read then says why
                send(self.process.stdin, (self.names, arguments))
            return [self.checked(name, self.answer(name), answers) for name in self.names]
        except BaseException:
            self.close()
            raise

    def answer(self, name: str) -> Any:
        deadline = time.monotonic() + self.seconds
        size = int.from_bytes(self.read(name, LENGTH, deadline), "big")
        return pickle.loads(self.read(name, size, deadline))

    def read(self, name: str, size: int, deadline: float) -> bytes:
        assert self.process is not None and self.process.stdout is not None
        found = b""
        while len(found) < size:
            if not readable_within(self.process.stdout, deadline - time.monotonic()):
                raise self.failed(name, f"took longer than {self.seconds:g} s ({self.settings[1]})")
            part = os.read(self.process.stdout.fileno(), size - len(found))
            if not part:
                raise self.failed(name, f"ended its process (exit status {self.process.wait()})")
            found += part
        return found

    def checked(self, name: str, found: Any, answers: int) -> list[float]:
        if isinstance(found, tuple):
            raise self.failed(*found)
        if len(found) != answers:
            raise self.failed(name, f"returned {len(found)} rewards for {answers} answers")
        rewards = [math.nan if one is None else one for one in found]
        if any(one is not None and not math.isfinite(one) for one in found):
            raise self.failed(name, "returned a reward that is not a finite number; None says that it does not apply")
        return rewards

    def failed(self, name: str, why: str) -> RewardFailed:
        return RewardFailed(f"{self.settings[0]}={name}: {why}")

    def close(self) -> None:
        """Ends the process, whatever it does."""
        if self.process is not None:
            end(self.process)
        self.process = None
