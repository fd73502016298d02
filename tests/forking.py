"""Python processes that start at once: forks of one that has imported torch, Lightning and this package already.

`Forked` is `subprocess.Popen` for commands `python -m MODULE ...`. Environment, folder, descriptors, signals and exit
codes are those of a real process, and it is a child of the process that starts it. Only what modules read from the
environment when they are imported is older; of that a run needs its rank, which is set here.

A process that starts others so has a *spare*: a child with a single thread and everything imported, which forks on
request and ends with its owner. What it forks is orphaned at once, and goes to the owner, which asks for orphans in
that moment. Each forked process has a spare of its own, so what it starts by `python -m` is forked, too: ranks of
Lightning and torchrun, and the processes that write checkpoints.

Other commands, and all commands on systems other than Linux, are started as usual.
"""

import ctypes
import faulthandler
import fcntl
import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SET_CHILD_SUBREAPER = 36  # of prctl
FOLDERS = ("callbacks", "parallel", "runs", "training")  # of this package: what a run imports, and none of an extra
MODULES = ("torch.distributed.run", "tensorboard.backend.event_processing.event_accumulator",
           "matplotlib.backends.backend_agg", "PIL.JpegImagePlugin")  # fmt: skip

lock = threading.Lock()
spare: socket.socket | None = None
execute_child = subprocess.Popen._execute_child


class Forked(subprocess.Popen):
    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags,
                       shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *rest):  # fmt: skip
        words = [word for word in args if word != "-u"] if isinstance(args, list | tuple) else []
        if sys.platform != "linux" or words[:2] != [sys.executable, "-m"]:
            execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags,
                          shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *rest)  # fmt: skip
            return
        given = enumerate((p2cread, c2pwrite, errwrite))
        sources = {number: number for number in pass_fds} | {own: own if it == -1 else it for own, it in given}
        *_, new_session = rest[:6]
        request = {
            "words": [os.fspath(word) for word in words[2:]], "folder": os.fspath(cwd or os.getcwd()),
            "environment": dict(os.environ if env is None else env), "targets": list(sources),
            "new_session": new_session, "blocked": list(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        }  # fmt: skip
        self.pid = fork(json.dumps(request).encode(), list(sources.values()))
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def fork(request: bytes, descriptors: list[int]) -> int:
    """Has this process's spare start another child of this process. Returns its id."""
    global spare
    with lock:
        if spare is None:
            spare, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            code = f"import tests.forking; tests.forking.main({there.fileno()})"
            started = subprocess.Popen(
                [sys.executable, "-c", code], cwd=ROOT, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            started.returncode = 0  # it ends with this process, which need not wait for it
            there.close()
        prctl = ctypes.CDLL(None).prctl
        prctl(SET_CHILD_SUBREAPER, 1)
        try:
            socket.send_fds(spare, [request], descriptors)
            return int(spare.recv(100))
        finally:
            prctl(SET_CHILD_SUBREAPER, 0)


def main(descriptor: int) -> None:
    """A spare; and after a fork a spare again, or a process that runs a module."""
    global spare
    for folder in FOLDERS:
        package = importlib.import_module(f"dsv3_lightning.{folder}")
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(found.name)
    for name in MODULES:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a process with several threads must not fork"
    gc.freeze()
    requests = socket.socket(fileno=descriptor)
    while True:
        request, descriptors = serve(requests)
        spare, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork():
            there.close()
            become(request, descriptors, requests)
            return
        for number in descriptors:
            os.close(number)
        spare.close()
        requests.close()
        requests = there


def serve(requests: socket.socket) -> tuple[dict, list[int]]:
    """Forks at each request. Returns the request and its descriptors in the processes that are forked alone."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 100)
        if not message:
            os._exit(0)  # the owner is gone
        if between := os.fork():
            os.waitpid(between, 0)
            for number in descriptors:
                os.close(number)
            continue
        between = os.getpid()
        if os.fork():
            os._exit(0)
        while os.getppid() == between:
            time.sleep(0.0005)
        return json.loads(message), descriptors


def become(request: dict, descriptors: list[int], requests: socket.socket) -> None:
    """Tells the owner that this is the process that it asked for, and runs the module."""
    global spare
    if request["new_session"]:
        os.setsid()
    requests.send(str(os.getpid()).encode())
    requests.close()
    above = max(request["targets"]) + 1  # where nothing has to be put
    with spare:
        spare = socket.socket(fileno=fcntl.fcntl(spare, fcntl.F_DUPFD_CLOEXEC, above))
    high = [fcntl.fcntl(number, fcntl.F_DUPFD, above) for number in descriptors]
    for number, target in zip(high, request["targets"], strict=True):
        os.dup2(number, target)
    for number in (*high, *(number for number in descriptors if number not in request["targets"])):
        os.close(number)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    if os.environ.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)
    from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

    rank_zero_only.rank = _get_rank() or 0
    subprocess.Popen._execute_child = Forked._execute_child
    module, *sys.argv[1:] = request["words"]
    sys.path[0] = request["folder"]
    sys.modules.pop(module, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
