"""A small reader of LaTeX, which compares values: the second opinion beside math-verify. Imports no torch.

It reads numbers, letters, + − · / ^ !, fractions, roots, the usual functions, equations, intervals, sets, tuples and
matrices. Letters get random values, so equal expressions agree at all of them. Anything else counts as unreadable.
"""

import random
import re
from typing import Any, NamedTuple, TypeAlias

import mpmath

from dsv3_lightning.evaluation.arithmetic import Unknown, value_of

DIGITS = 40
TOLERANCE = mpmath.mpf(10) ** -12  # relative: a rounded decimal is not equal to what it stands for
SAMPLES = 3
SPELLINGS = {
    **{r"\left": "", r"\right": "", r"\displaystyle": "", "$": "", "~": " ", r"\%": "%", "{,}": ",", "{}": ""},
    **{r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cdot": "*", r"\times": "*", r"\div": "/", "**": "^", "·": "*"},
    **{"×": "*", "−": "-", "–": "-", r"\leq": "≤", r"\le": "≤", r"\geq": "≥", r"\ge": "≥", r"\neq": "≠", r"\ne": "≠"},
    **{"<=": "≤", ">=": "≥", r"\lt": "<", r"\gt": ">", r"\in": "∈", r"\lbrace": r"\{", r"\rbrace": r"\}"},
}
TURNED = {">": "<", "≥": "≤"}
THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(,[0-9]{3})+(?![0-9,])")
OPENING, CLOSING = (r"\{", "(", "[", "{", r"\begin"), (r"\}", ")", "]", "}", r"\end")
PIECES = re.compile(r"\\(?:[A-Za-z]+|.)|.", re.DOTALL)


Value: TypeAlias = Any  # a complex number of mpmath, which has no types, or a Structure


class Structure(NamedTuple):
    """Several values. kind: the brackets around them, the relation between them, or "" for a plain list."""

    kind: str
    items: tuple[Value, ...]


def equal_expressions(a: str, b: str) -> bool | None:
    """Whether two pieces of LaTeX mean the same; None where either can't be read.

    >>> equal_expressions("2^{-99}", "2^{-98}"), equal_expressions("x^2-1", "(x-1)(x+1)"), equal_expressions("?", "1")
    (False, True, None)
    """
    (a, units_a), (b, units_b) = spelled(a), spelled(b)
    if units_a and units_b and units_a != units_b:
        return False
    with mpmath.workdps(DIGITS):
        try:
            return same(*([value(text, sample) for sample in range(SAMPLES)] for text in (a, b)))
        except (Unknown, ArithmeticError, ValueError, TypeError):
            return None


def spelled(text: str) -> tuple[str, list[str]]:
    """The text with one spelling for each sign, and the units after its values, which are left out."""
    units = re.findall(r"\\(?:text|mbox|textrm)\{([^{}]*)\}", re.sub(r"\\text\{\s*(?:and|or)\s*\}", ",", text))
    text = re.sub(r"\\text\{\s*(?:and|or)\s*\}", ",", text)
    text = re.sub(r"\\(?:text|mbox|textrm)\{[^{}]*\}(?:\^\{?[23]\}?)?\s*$", "", text)
    text, degrees = re.subn(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|°", "", text)
    text = re.sub(r"(?<!\\)\\[!,;: ]", " ", text)
    text = clear(text)
    for old in sorted(SPELLINGS, key=len, reverse=True):
        end = r"(?![A-Za-z])" if old[-1].isalpha() else ""
        text = re.sub(re.escape(old) + end, lambda _, new=SPELLINGS[old]: new, text)  # type: ignore[misc]
    return text.strip().removesuffix("."), [unit.strip() for unit in units] + ["°"] * bool(degrees)


def value(text: str, sample: int) -> Value:
    """The value of a text at one sample of its letters. Raises Unknown."""
    text = text.strip()
    if not re.search(r"[([{]", text):
        text = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    sides, relations = split(text, ("<", ">", "≤", "≥", "=", "≠", "∈"))
    if len(relations) == 1:
        items = tuple(value(side, sample) for side in sides)
        turned = relations[0] in TURNED
        return Structure(TURNED.get(relations[0], relations[0]), items[::-1] if turned else items)
    if relations:
        return Structure("".join(relations), tuple(value(side, sample) for side in sides))
    for separators in ((r"\cup",), (",", ";"), ("&", r"\\")):
        parts, found = split(text, separators)
        if found:
            return Structure("".join(sorted(set(found) & {r"\cup"})), tuple(value(part, sample) for part in parts))
    if matrix := re.fullmatch(r"\\begin\{([a-z]*matrix)\}(.*)\\end\{\1\}", text, re.DOTALL):
        rows, _ = split(matrix[2], (r"\\",))
        return Structure("rows", tuple(Structure("row", entries(row, sample)) for row in rows if row.strip()))
    inside, brackets = enclosed(text)
    if brackets == r"\{\}" or brackets and split(inside, (",", ";"))[1]:
        return Structure(brackets, entries(inside, sample, (",", ";")))
    halves, found = split(text, (r"\pm",))
    if len(found) == 1:
        both = (" + ".join(halves), " - ".join(halves))
        return Structure("", tuple(value(one if halves[0].strip() else one[2:], sample) for one in both))
    return value_of(text, lambda name: letter(name, sample))


def entries(text: str, sample: int, separators: tuple[str, ...] = ("&",)) -> tuple[Value, ...]:
    return tuple(value(part, sample) for part in split(text, separators)[0])


def letter(name: str, sample: int) -> mpmath.mpc:
    """A number for a letter, negative or positive, the same in every expression."""
    return mpmath.mpc(random.Random(f"{name} {sample}").uniform(-3, 3))


def split(text: str, separators: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The parts of a text between separators outside of brackets, and those separators."""
    parts, found, depth = [""], [], 0
    for piece in PIECES.findall(text):
        depth += (piece in OPENING) - (piece in CLOSING)
        if depth == 0 and piece in separators:
            found.append(piece)
            parts.append("")
        else:
            parts[-1] += piece
    return parts, found


def enclosed(text: str) -> tuple[str, str]:
    """What is between the brackets around the whole text, and these brackets; "" where there are none."""
    pieces = PIECES.findall(text)
    if len(pieces) < 2 or pieces[0] not in (r"\{", "(", "[") or pieces[-1] not in (r"\}", ")", "]"):
        return "", ""
    depth = 0
    for place, piece in enumerate(pieces):
        depth += (piece in OPENING) - (piece in CLOSING)
        if not depth:
            whole = place == len(pieces) - 1
            return ("".join(pieces[1:-1]), pieces[0] + pieces[-1]) if whole else ("", "")
    return "", ""


def same(a: list[Value], b: list[Value]) -> bool:
    """Whether two values, each at all samples, are the same. Raises Unknown for an equation that always holds."""
    first_a, first_b = a[0], b[0]
    if not isinstance(first_a, Structure) and not isinstance(first_b, Structure):
        return all(x == y or abs(x - y) <= TOLERANCE * max(abs(x), abs(y)) for x, y in zip(a, b))
    if not (isinstance(first_a, Structure) and isinstance(first_b, Structure)):
        lone, other = (b, a) if isinstance(first_a, Structure) else (a, b)
        structures = [one for one in other if isinstance(one, Structure)]
        if structures[0].kind == "=" and len(structures[0].items) == 2:  # x = 5 and 5
            return same([one.items[1] for one in structures], lone)
        return False
    if first_a.kind != first_b.kind or len(first_a.items) != len(first_b.items):
        return False
    columns_a, columns_b = ([list(column) for column in zip(*(one.items for one in values))] for values in (a, b))
    if first_a.kind == "=":
        return same_equation(columns_a, columns_b)
    if first_a.kind not in ("", r"\{\}", r"\cup"):
        return all(same(x, y) for x, y in zip(columns_a, columns_b))
    left = columns_b
    for column in columns_a:
        match = next((place for place, other in enumerate(left) if same(column, other)), None)
        if match is None:
            return False
        left = left[:match] + left[match + 1 :]
    return True


def same_equation(a: list[list[Value]], b: list[list[Value]]) -> bool:
    """Whether left minus right of one equation is a multiple of the other's, at all samples."""
    if any(isinstance(one, Structure) for side in (*a, *b) for one in side):
        return all(same(x, y) for x, y in zip(a, b))
    first, second = ([left - right for left, right in zip(*sides)] for sides in (a, b))
    if any(abs(one) < TOLERANCE for one in (*first, *second)):
        raise Unknown("an equation that holds for every letter says nothing")
    ratios = [x / y for x, y in zip(first, second)]
    return all(abs(ratio - ratios[0]) <= TOLERANCE * abs(ratio) for ratio in ratios)


def clear(text: str) -> str:
    """The LaTeX without spellings that math-verify misreads: upright letters, and roots of what is in parentheses."""
    text = re.sub(r"\\(?:mathrm|operatorname)\{([A-Za-z]+)\}", r"\1", text)
    return re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)


def literals(text: str) -> list[str]:
    """The numbers written in a text, sorted."""
    return sorted(re.findall(r"[0-9.]*[0-9]", text))
