"""Processes that tests fork are like those that they would start."""

import fcntl
import os
import signal
import subprocess
import sys

import pytest

from tests.forking import Forked

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is forked")]
ASKED = """
import os, subprocess, sys
depth, *numbers = map(int, sys.argv[1:])
for number in numbers:
    os.write(number, b"%d " % number)
if depth:
    command = [sys.executable, "-m", "asked", str(depth - 1), *map(str, numbers)]
    assert subprocess.Popen(command, pass_fds=numbers).wait() == 3
    print(os.environ["RANK"], os.getcwd(), os.getppid())
sys.exit(3)
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    (tmp_path / "asked.py").write_text(ASKED)

    def start(*words, **options):
        return Forked([sys.executable, "-m", "asked", *map(str, words)], cwd=tmp_path, stdout=subprocess.PIPE,
                      text=True, env=os.environ | {"RANK": "5"}, **options)  # fmt: skip

    return start


def test_they_and_their_children_have_descriptors_environment_folder_parent_and_exit_code(start, tmp_path):
    """Whatever the descriptors' numbers, which may be those of some in use."""
    for least in (*range(3, 12), 101, 300):
        reading, writing = os.pipe()
        number = fcntl.fcntl(writing, fcntl.F_DUPFD, least)
        os.close(writing)
        with start(1, number, pass_fds=[number]) as process:
            output, _ = process.communicate(timeout=60)
        os.close(number)
        assert os.read(reading, 100).decode().split() == [str(number)] * 2
        os.close(reading)
        assert process.returncode == 3 and output.split() == ["5", str(tmp_path), str(os.getpid())]


def test_a_signal_ends_them(tmp_path):
    with Forked([sys.executable, "-m", "http.server", "0"], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
                stderr=subprocess.DEVNULL) as process:  # fmt: skip
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
    assert process.returncode == -signal.SIGTERM
