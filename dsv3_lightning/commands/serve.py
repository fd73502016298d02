"""`dsv3 serve`: an OpenAI-compatible server for one model."""

import argparse
import socket
from pathlib import Path

from dsv3_lightning.common.flags import context_argument, model_argument, port, positive
from dsv3_lightning.errors import ConfigError


def arguments(parser: argparse.ArgumentParser) -> None:
    model_argument(parser)
    parser.add_argument("--name", metavar="TEXT", help="what clients call the model; default: the folder's name")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="default %(default)s")
    parser.add_argument("--port", type=port, default=8000, metavar="N", help="0: any; default %(default)s")
    parser.add_argument("--slots", type=int, default=16, metavar="N", help="texts at a time; default %(default)s")
    context_argument(parser)
    parser.add_argument("--max-waiting", type=int, default=64, metavar="N", help="beyond them; default %(default)s")
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="SECONDS", help="of a text; default %(default)s"
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="of the CPU; default: as torch chooses")


def run(
    checkpoint: Path,
    name: str | None,
    host: str,
    port: int,
    slots: int,
    context: int | None,
    max_waiting: int,
    timeout: float,
    threads: int | None,
) -> int:
    """Until Ctrl-C."""
    import torch

    from dsv3_lightning.inference.batching import Engine, check_engine
    from dsv3_lightning.runs.models import load

    check_engine(slots, max_waiting, timeout)
    try:
        from dsv3_lightning.inference.server import Server, build_app
    except ImportError as error:
        raise ConfigError(f"serve needs {error.name}: pip install 'dsv3-lightning[serve]'") from None
    if threads is not None:
        torch.set_num_threads(threads)
    with listen(host, port) as listener:
        model, tokenizer = load(checkpoint)
        called = name or checkpoint.resolve().name
        engine = Engine(model, tokenizer, slots, max_waiting, timeout, context)
        server = Server(build_app(engine, tokenizer, called))
        print(f"{called}: {slots} texts at a time; http://{host}:{listener.getsockname()[1]}/v1", flush=True)
        try:
            server.run([listener])
        finally:
            engine.close()
    return 0


def listen(host: str, port: int) -> socket.socket:
    """Before the model is read, so that a port in use is told at once. Raises ConfigError."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: {error.strerror}") from error
