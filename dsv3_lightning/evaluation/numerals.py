"""Exact numbers from short texts: integers, decimals, fractions, percentages, amounts of money. Imports no torch."""

import re
from fractions import Fraction

LONGEST = 100  # characters: no answer is longer, and Python's int() refuses 4,300 digits
LARGEST_EXPONENT = 400

SAME = str.maketrans(
    {
        "−": "-",
        "‐": "-",
        "‑": "-",
        "–": "-",
        "﹣": "-",
        "－": "-",
        "＋": "+",
        "．": ".",
        "，": ",",
        "％": "%",
        "⁄": "/",
        "∕": "/",
    }
    | {chr(ord("０") + digit): str(digit) for digit in range(10)}
)
DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
DECIMAL = rf"(?:{DIGITS}(?:\.[0-9]*)?|\.[0-9]+)"
NUMBER = re.compile(
    rf"(?P<sign>[+-]?)(?P<money>[$€£¥]?)(?P<inner>[+-]?)(?P<top>{DECIMAL})"
    rf"(?:[eE](?P<power>[+-]?[0-9]{{1,3}})|/(?P<bottom>{DIGITS}))?(?P<percent>%|percent)?"
)
FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}|\\[dt]?frac([0-9])([0-9])")


def read_number(text: str) -> Fraction | None:
    """The number that the whole text is, exactly; None where it is anything else, or several numbers.

    Commas only group thousands, a percentage is a hundredth, and no digit is dropped: "1 2" is no number.

    >>> [str(read_number(text)) for text in ("-1,234.50", "$29.00", "10%", "3/4", "\\\\frac{1}{2}", "1,23", "4 or 5")]
    ['-2469/2', '29', '1/10', '3/4', '1/2', 'None', 'None']
    """
    if len(text) > LONGEST:
        return None
    match = NUMBER.fullmatch(plain(text))
    if match is None or match["sign"] and match["inner"]:
        return None
    if match["power"] and abs(int(match["power"])) > LARGEST_EXPONENT:
        return None
    value = Fraction(match["top"].replace(",", "").removesuffix(".") + (f"e{match['power']}" if match["power"] else ""))
    if match["bottom"]:
        bottom = int(match["bottom"].replace(",", ""))
        if not bottom:
            return None
        value /= bottom
    value = -value if "-" in (match["sign"], match["inner"]) else value
    return value / 100 if match["percent"] else value


def plain(text: str) -> str:
    """A numeral without the decoration of LaTeX and Markdown, and with ASCII's signs and digits."""
    text = text.strip().translate(SAME)
    text = re.sub(r"\\[,!;: ]|\\left|\\right|~|\*\*", "", text).replace("{,}", ",").replace(r"\%", "%")
    text = text.replace(r"\$", "$")
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1]
    text = re.sub(r"^\\[(\[](.*)\\[)\]]$", r"\1", text)
    text = re.sub(r"^[A-Za-z]\s*=\s*", "", text.strip())
    text = FRACTION.sub(lambda m: f"{m[1] or m[3]}/{m[2] or m[4]}", text)
    text = re.sub(r"^([+-])\s+", r"\1", text)
    text = re.sub(r"\s*([/%])\s*|\s+(?=percent$)", lambda m: m[1] or "", text)
    return text.strip()


def numerals(text: str) -> list[str]:
    """The runs of digits in a text, to tell several numbers from none."""
    return re.findall(rf"{DECIMAL}", text.translate(SAME))
