"""Checking of generated answers: every sample gets exactly one verdict, and what can't be read is never right.

An answer is compared whole with the expected one, never searched for in it, and numbers exactly. `right`, `wrong` and
`unreadable` (no final answer was marked, or nothing can read it) are counted apart. Imports no torch.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.evaluation.latex import check_library, same_expression, squeezed
from dsv3_lightning.evaluation.numerals import numerals, read_number
from dsv3_lightning.evaluation.words import normalized

Verdict = Literal["right", "wrong", "unreadable"]
Compare = Callable[[str, str], Verdict]

THINK, THOUGHT = "<think>", "</think>"
BOX = re.compile(r"\\(?:boxed|fbox)\s*")
HASHES = re.compile(r"####[^\S\n]*([^\n]*)")
SAYS = re.compile(r"\banswer\b[*_\s]*(?::|\bis\b:?)[*_]*", re.IGNORECASE)
LINE = re.compile(r"[^\S\n]*\n?([^\n]*)")
HOPES = re.compile(r"\.?\s*I hope it is correct\.?\s*$")  # the end of answers in Minerva's format


def check(checker: str, text: str, answers: str | Sequence[str]) -> Verdict:
    """The verdict on a generated text, by one of CHECKERS. Raises ConfigError for another name.

    text: what was generated, up to its end token. answers: the expected answer, or all that are accepted.
    A text with several final answers is right only if every one of them is.

    >>> check("integer", "so it is \\\\boxed{042}", "42"), check("integer", "", "42"), check("integer", "no idea", "42")
    ('right', 'wrong', 'unreadable')
    """
    compare, whole_text = CHECKERS[valid_checker(checker)]
    accepted = [answers] if isinstance(answers, str) else list(answers)
    found = [text] if whole_text else final_answers(text)
    return all_right([best(compare, candidate, accepted) for candidate in found])


def check_all(checker: str, texts: Sequence[str], answers: Sequence[str | Sequence[str]]) -> list[Verdict]:
    """One verdict for each text, in their order. Raises ConfigError unless there is an answer for each."""
    if len(texts) != len(answers):
        raise ConfigError(f"{len(texts)} texts to check and {len(answers)} answers; each text needs one")
    verdicts = [check(checker, text, answer) for text, answer in zip(texts, answers)]
    assert len(verdicts) == len(texts)
    return verdicts


def best(compare: Compare, candidate: str, accepted: list[str]) -> Verdict:
    """The verdict where several answers are accepted: the best one."""
    if not candidate.strip():
        return "wrong"
    verdicts = {compare(candidate, answer) if answer.strip() else "unreadable" for answer in accepted}
    return "right" if "right" in verdicts else "wrong" if "wrong" in verdicts else "unreadable"


def all_right(verdicts: list[Verdict]) -> Verdict:
    """The verdict on a text with these final answers."""
    if not verdicts or all(verdict == "unreadable" for verdict in verdicts):
        return "unreadable"
    return "right" if all(verdict == "right" for verdict in verdicts) else "wrong"


def final_answers(text: str) -> list[str]:
    r"""The answers that a text marks as final, after its reasoning; none if it marks none or its reasoning never ends.

    By the first of these that occurs: every \boxed{...}; the line of the first ####, since models run on after it; the
    line of the last "Answer:" or "answer is", since reasoning may hold others; the whole text, if it is one line.

    >>> final_answers("Answer: 3? No. The answer is 4."), final_answers(r"\boxed{1} or \boxed{2}")
    (['4.'], ['1', '2'])
    """
    if THOUGHT in text:
        text = text.rpartition(THOUGHT)[2]
    elif THINK in text:
        return []
    if BOX.search(text):
        return boxed(text)
    if match := HASHES.search(text):
        return [match[1]]
    if said := list(SAYS.finditer(text)):
        rest = LINE.match(text, said[-1].end())
        assert rest is not None
        return [HOPES.sub("", rest[1])]
    return [] if "\n" in text.strip() else [text]


def boxed(text: str) -> list[str]:
    """The content of every box, one in another left out; none if a box is never closed."""
    found, place = [], 0
    while match := BOX.search(text, place):
        begin = match.end()
        if text[begin : begin + 1] != "{":
            found.append(text[begin : begin + 1])
            place = begin + 1
            continue
        end = closing_brace(text, begin)
        if end is None:
            return []
        found.append(text[begin + 1 : end])
        place = end + 1
    return found


def closing_brace(text: str, begin: int) -> int | None:
    """The place of the brace that closes the one at `begin`; escaped braces don't count."""
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text[begin:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if not depth:
            return begin + match.start()
    return None


def without_end(text: str) -> str:
    """An answer without surrounding space and emphasis, and without the sentence's period."""
    text = text.strip().strip("*_").strip()
    return text.removesuffix(".") if not text.endswith("..") else text


def same_number(answer: str, expected: str) -> Verdict:
    """Whether two texts are the same number."""
    value, wanted = read_number(without_end(answer)), read_number(without_end(expected))
    if wanted is None:
        return "unreadable"
    if value is None:
        return "wrong" if len(numerals(answer)) > 1 else "unreadable"
    return "right" if value == wanted else "wrong"


def same_integer(answer: str, expected: str) -> Verdict:
    """As `same_number`, for an expected whole number."""
    wanted = read_number(without_end(expected))
    return "unreadable" if wanted is None or wanted.denominator != 1 else same_number(answer, expected)


def same_text(answer: str, expected: str) -> Verdict:
    """Whether two short texts are equal but for letter case, spacing, and quotes or brackets around them."""
    return "right" if bare(answer) == bare(expected) else "wrong"


def bare(text: str) -> str:
    text = " ".join(without_end(text).casefold().split())
    while len(text) > 2 and (text[0] + text[-1]) in ('""', "''", "()", "[]", "“”", "‘’", "``", "$$"):
        text = text[1:-1].strip()
    return text


def same_words(answer: str, expected: str) -> Verdict:
    """Whether two short texts are equal but for letter case, punctuation, articles and spacing."""
    return "right" if normalized(answer) == normalized(expected) != "" else "wrong"


def equal_text(answer: str, expected: str) -> Verdict:
    """Whether two texts are equal but for the space around them."""
    return "right" if answer.strip() == expected.strip() else "wrong"


def same_math(answer: str, expected: str) -> Verdict:
    """Whether two pieces of LaTeX mean the same, by math-verify in a process of its own; exactly, for plain numbers."""
    value, wanted = read_number(without_end(answer)), read_number(without_end(expected))
    if value is not None and wanted is not None:
        return "right" if value == wanted else "wrong"
    return same_expression(without_end(answer), without_end(expected))


# By name: the comparison of an answer with an expected one, and whether the answer is the whole text.
CHECKERS: dict[str, tuple[Compare, bool]] = {
    "integer": (same_integer, False),
    "number": (same_number, False),
    "text": (same_text, False),
    "words": (same_words, False),
    "exact": (equal_text, True),
    "math": (same_math, False),
}


def valid_checker(name: str) -> str:
    """The name, if it is that of a checker. Raises ConfigError."""
    if name not in CHECKERS:
        raise ConfigError(f"checker {name!r}: no such checker; valid: {', '.join(CHECKERS)}")
    return name


def check_expected(checker: str, answers: str | Sequence[str]) -> None:
    """Raises ConfigError for expected answers that no text could match, and where the checker's library is missing."""
    accepted = [answers] if isinstance(answers, str) else answers
    if not accepted or not all(answer.strip() for answer in accepted):
        raise ConfigError(f"answer {answers!r}: must not be empty")
    if valid_checker(checker) == "math":
        check_library()
    if checker in ("integer", "number"):
        for answer in accepted:
            if CHECKERS[checker][0](answer, answer) != "right":
                raise ConfigError(f"answer {answer!r}: is not {'an integer' if checker == 'integer' else 'a number'}")


@dataclass
class Tally:
    """Counts of verdicts."""

    right: int = 0
    wrong: int = 0
    unreadable: int = 0

    @classmethod
    def of(cls, verdicts: Iterable[Verdict]) -> "Tally":
        tally = cls()
        for verdict in verdicts:
            setattr(tally, verdict, getattr(tally, verdict) + 1)
        return tally

    @property
    def total(self) -> int:
        return self.right + self.wrong + self.unreadable


def vote(checker: str, text: str) -> str | None:
    """What a text votes for where the majority of several answers decides; None where it marks no single answer."""
    found = [text] if CHECKERS[valid_checker(checker)][1] else final_answers(text)
    keys = {key_of(checker, candidate) for candidate in found}
    return keys.pop() if len(keys) == 1 else None


def key_of(checker: str, candidate: str) -> str | None:
    """One spelling for equal answers."""
    value = None if checker in ("exact", "text", "words") else read_number(without_end(candidate))
    if value is not None or checker in ("integer", "number"):
        return None if value is None else str(value)
    if checker == "exact":
        return candidate.strip() or None
    spelling = {"text": bare, "words": normalized}.get(checker, lambda text: squeezed(without_end(text)))
    return spelling(candidate) or None
