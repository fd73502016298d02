"""Train DeepSeek-V3-architecture language models from one YAML file, on a laptop or a cluster."""

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"

if TYPE_CHECKING:
    from dsv3_lightning.api import ModelConfig as ModelConfig
    from dsv3_lightning.api import PretrainModule as PretrainModule
    from dsv3_lightning.api import Sampling as Sampling
    from dsv3_lightning.api import Tokenizer as Tokenizer
    from dsv3_lightning.api import Transformer as Transformer
    from dsv3_lightning.api import build_model as build_model
    from dsv3_lightning.api import generate as generate
    from dsv3_lightning.api import load as load

API = ("ModelConfig", "PretrainModule", "Sampling", "Tokenizer", "Transformer", "build_model", "generate", "load")


def __getattr__(name: str) -> Any:
    """Names of the Python API, imported when first used: the command line's help loads no torch."""
    if name not in API:
        raise AttributeError(f"module 'dsv3_lightning' has no attribute {name!r}")
    from dsv3_lightning import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *API])
