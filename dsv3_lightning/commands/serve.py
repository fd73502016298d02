"""`dsv3 serve`: an OpenAI-compatible server for one model."""

import argparse
import ipaddress
import os
import re
import socket
import sys
from pathlib import Path

from dsv3_lightning.common.flags import above_zero, context_argument, model_argument, port, positive
from dsv3_lightning.errors import ConfigError

KEY_VARIABLE = "DSV3_API_KEY"  # other users can see a process's arguments but not its environment


def arguments(parser: argparse.ArgumentParser) -> None:
    model_argument(parser)
    parser.add_argument("--name", metavar="TEXT", help="what clients call the model; default: the folder's name")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="default %(default)s")
    parser.add_argument("--port", type=port, default=8000, metavar="N", help="0: any; default %(default)s")
    parser.add_argument(
        "--slots", type=int, default=16, metavar="N", help="requests generated at a time; default %(default)s"
    )
    context_argument(parser)
    parser.add_argument(
        "--max-waiting",
        type=int,
        default=64,
        metavar="N",
        help="requests that may wait for a slot; default %(default)s",
    )
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="SECONDS", help="limit per request; default %(default)s"
    )
    help = "maximum size of a request; default %(default)s"
    parser.add_argument("--body-megabytes", type=above_zero, default=8.0, metavar="X", help=help)
    help = "the key that clients must give; default: $DSV3_API_KEY, else none"
    parser.add_argument("--api-key", metavar="TEXT", help=help)
    help = "allow requests from web pages of this origin, such as http://localhost:3000; may be repeated"
    parser.add_argument("--cors-origin", action="append", default=[], metavar="ORIGIN", help=help)
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads; default: torch's choice")


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
    api_key: str | None,
    cors_origin: list[str],
    body_megabytes: float,
) -> int:
    """Serves the model until Ctrl-C."""
    import torch

    from dsv3_lightning.inference.batching import Engine, check_engine
    from dsv3_lightning.runs.models import load

    check_engine(slots, max_waiting, timeout)
    key = find_key(api_key)
    for origin in cors_origin:
        check_origin(origin)
    try:
        from dsv3_lightning.inference.server.app import build_app
        from dsv3_lightning.inference.server.bodies import MEGABYTE
        from dsv3_lightning.inference.server.run import Server
    except ImportError as error:
        raise ConfigError(f"serve needs {error.name}: pip install 'dsv3-lightning[serve]'") from None
    if threads is not None:
        torch.set_num_threads(threads)
    with listen(host, port) as listener:
        model, tokenizer = load(checkpoint)
        called = name or checkpoint.resolve().name
        engine = Engine(model, tokenizer, slots, max_waiting, timeout, context)
        body_bytes = int(body_megabytes * MEGABYTE)
        server = Server(build_app(engine, tokenizer, called, body_bytes, key, tuple(cors_origin)))
        if key is None and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
            print(
                f"dsv3: --host {host} without a key: whoever reaches this machine can use the model; give --api-key, "
                f"or set {KEY_VARIABLE}",
                file=sys.stderr,
            )
        print(f"{called}: {slots} texts at a time; http://{host}:{listener.getsockname()[1]}/v1", flush=True)
        try:
            server.run([listener])
        finally:
            engine.close()
    return 0


def find_key(given: str | None) -> str | None:
    """The key that clients must give, from the flag or the environment; None for none. Raises ConfigError."""
    source, key = ("--api-key", given) if given is not None else (KEY_VARIABLE, os.environ.get(KEY_VARIABLE))
    if key is not None and not re.fullmatch("[!-~]+", key):
        raise ConfigError(f"{source}: must be of ASCII letters, digits and marks, without spaces, and not empty")
    return key


def check_origin(origin: str) -> None:
    """Raises ConfigError for a text that no browser sends as an origin."""
    if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#]+", origin):
        raise ConfigError(f"--cors-origin {origin}: must be such as http://localhost:3000, without a path, or *")


def listen(host: str, port: int) -> socket.socket:
    """A socket bound before the model is loaded, so that a port in use is reported at once. Raises ConfigError."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: {error.strerror}") from error
