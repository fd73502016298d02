"""C4's rules for web text (arXiv 1910.10683 §2.2), as FineWeb uses them: lines to remove, and measures of the rest."""

import re

import numpy as np

from dsv3_lightning.data.cleaning.facts import Facts

BOILERPLATE = (
    "javascript",
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
SENTENCE = re.compile(r"[.!?。！？]+[\"'”’)\]]*(?:\s|$)|[。！？]")


def without_lines(text: str, min_words: float | None, max_word_chars: float | None, boilerplate: bool) -> str:
    """The text without lines that are too short, have too long a word, or (if `boilerplate`) a phrase of BOILERPLATE.

    Words are separated by white space. Empty lines are kept.
    """
    kept = []
    for line in text.split("\n"):
        found = line.split()
        if found:
            if min_words is not None and len(found) < min_words:
                continue
            if max_word_chars is not None and max(map(len, found)) > max_word_chars:
                continue
            if boilerplate and any(phrase in line.lower() for phrase in BOILERPLATE):
                continue
        kept.append(line)
    return "\n".join(kept).strip() if len(kept) < text.count("\n") + 1 else text


def lorem_ipsum(facts: Facts) -> np.ndarray:
    return np.array([text.lower().count("lorem ipsum") for text in facts.texts], float)


def curly_brackets(facts: Facts) -> np.ndarray:
    return np.array([text.count("{") for text in facts.texts], float)


def sentences(facts: Facts) -> np.ndarray:
    """Sentences by their ends; a last one without an end counts too."""
    return np.array([len(SENTENCE.findall(text)) + (not ends(text)) for text in facts.texts], float)


def ends(text: str) -> bool:
    return not text.strip() or text.rstrip().rstrip("\"'”’)]").endswith((".", "!", "?", "。", "！", "？"))
