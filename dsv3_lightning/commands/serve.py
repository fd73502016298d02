"""`dsv3 serve`: an OpenAI-compatible server for one model."""

from pathlib import Path

import torch

from dsv3_lightning.commands.generate import load
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.inference.batching import Engine, check_engine


def serve(
    checkpoint: str, name: str | None, host: str, port: int, slots: int, max_waiting: int, timeout: float, threads: int
) -> int:
    """Until Ctrl-C."""
    check_engine(slots, max_waiting, timeout)
    try:
        import uvicorn

        from dsv3_lightning.inference.server import build_app
    except ImportError as error:
        raise ConfigError(f"serve needs {error.name}: pip install 'dsv3-lightning[serve]'") from None
    if threads:
        torch.set_num_threads(threads)
    model, tokenizer = load(checkpoint)
    called = name or Path(checkpoint).resolve().name
    engine = Engine(model, tokenizer, slots, max_waiting, timeout)
    print(f"{called}: {slots} texts at a time; http://{host}:{port}/v1", flush=True)
    try:
        uvicorn.run(build_app(engine, tokenizer, called), host=host, port=port, log_level="warning")
    finally:
        engine.close()
    return 0
