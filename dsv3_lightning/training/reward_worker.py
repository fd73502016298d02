"""The process in which reward functions run. It reads requests from its standard input and writes answers to stdout.

A request is a pickled (functions, arguments), and an answer, one for each function, a pickled list of what it returned,
or (function, error). Arguments of None ask only whether the functions are there.
Started as `python -m dsv3_lightning.training.reward_worker`; the parent ends it when a function takes too long.
"""

import importlib
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable
from typing import IO, Any

LENGTH = 8  # bytes of a message's length


def send(stream: IO[bytes], message: Any) -> None:
    content = pickle.dumps(message)
    stream.write(len(content).to_bytes(LENGTH, "big") + content)
    stream.flush()


def find(name: str) -> Callable[..., Any]:
    """The function module:name, also of a module in the working folder."""
    module, _, attribute = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return found


def call(name: str, arguments: dict[str, Any] | None) -> Any:
    """What the function returns as a list of numbers and None, or (name, what was wrong)."""
    try:
        function = find(name)
        if arguments is None:
            return []
        found = function(**arguments)
        return [None if one is None else float(one) for one in found]
    except BaseException as error:
        return (name, f"{type(error).__name__}: {' '.join(str(error).split())}")


def end_with(parent: int) -> None:
    """Ends this process once the parent is gone, whatever a function is doing."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a function prints isn't an answer
    sys.path.insert(0, os.getcwd())
    while head := requests.read(LENGTH):
        names, arguments = pickle.loads(requests.read(int.from_bytes(head, "big")))
        for name in names:  # one answer each, so that the parent knows which of them is running
            send(answers, call(name, arguments))


if __name__ == "__main__":
    main()
