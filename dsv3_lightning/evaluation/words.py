"""Short answers in words, compared as SQuAD does (arXiv 1606.05250): normalized, whole or by their common words.

Other than there, a number keeps its sign and its decimal point: -7 is not 7, and 1.5 is not 15.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = re.compile(rf"(?<=\d)\.(?=\d)|(?<![\w.])-(?=\.?\d)|([{re.escape(string.punctuation)}])")


def normalized(text: str) -> str:
    """Lower case without punctuation, English articles and surplus space; a text of nothing else keeps its words.

    >>> normalized(" The  U.S. dollar."), normalized("The A"), normalized("$-1,200.50, a well-known sum")
    ('us dollar', 'the a', '-1200.50 wellknown sum')
    """
    bare = PUNCTUATION.sub(lambda match: "" if match[1] else match[0], text.lower())
    return " ".join(ARTICLES.sub(" ", bare).split()) or " ".join(bare.split())


def common_words(answer: str, expected: str) -> float:
    """F1 of the answer's normalized words: the harmonic mean of the share that is expected and of the share of the
    expected ones that is there; 0 for an answer without words.

    >>> common_words("the red fox", "a red dog"), common_words("", "a red dog"), common_words("no no no", "no")
    (0.5, 0.0, 0.5)
    """
    own, wanted = normalized(answer).split(), normalized(expected).split()
    same = sum((Counter(own) & Counter(wanted)).values())
    return 2 * same / (len(own) + len(wanted)) if same else 0.0


def best_common_words(answers: Sequence[str], accepted: Sequence[str]) -> float:
    """The largest F1 with an accepted answer. Several final answers count as the worst of them, none as 0."""
    return min((max(common_words(answer, one) for one in accepted) for answer in answers), default=0.0)
