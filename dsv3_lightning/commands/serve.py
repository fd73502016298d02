"""`dsv3 serve`: an OpenAI-compatible server for one model."""

import socket
from pathlib import Path

import torch

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.inference.batching import Engine, check_engine
from dsv3_lightning.runs.models import load


def serve(
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
