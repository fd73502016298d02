"""The value of one LaTeX expression, by a parser of recursive descent. Imports no torch.

sum      = product (("+" | "-") product)*
product  = factor (("*" | "/")? factor)*      a number never follows without a sign: "1 2" is no product
factor   = ("+" | "-") factor | power
power    = atom ("!" | "%")* ("^" exponent)?
"""

import re
from collections.abc import Callable

import mpmath

NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+")
TOKEN = re.compile(rf"{NUMBER.pattern}|\\[A-Za-z]+|\\.|\S")
GREEK = re.compile(r"\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|varphi|psi|omega)")
CONSTANTS = {"e": mpmath.e, r"\pi": mpmath.pi, "π": mpmath.pi, "i": mpmath.j, r"\infty": mpmath.inf, "∞": mpmath.inf}
FUNCTIONS: dict[str, Callable[[mpmath.mpc], mpmath.mpc]] = {
    rf"\{name}": getattr(mpmath, name)
    for name in ("sin", "cos", "tan", "sec", "csc", "cot", "sinh", "cosh", "tanh", "exp", "log", "ln")
} | {r"\arcsin": mpmath.asin, r"\arccos": mpmath.acos, r"\arctan": mpmath.atan}
BRACKETS = {"(": ")", "[": "]", "{": "}", "|": "|"}
LARGEST_FACTORIAL = 1000


class Unknown(Exception):
    """Raised for what isn't read."""


def value_of(text: str, letter: Callable[[str], mpmath.mpc]) -> mpmath.mpc:
    """The value of an expression. letter: the value of a letter by its name. Raises Unknown and ArithmeticError."""
    parser = Parser(TOKEN.findall(text), letter)
    found = parser.sum()
    if parser.next():
        raise Unknown(f"{parser.next()} after the expression")
    return found


class Parser:
    def __init__(self, tokens: list[str], letter: Callable[[str], mpmath.mpc]) -> None:
        self.tokens, self.letter, self.place = tokens, letter, 0

    def next(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self, wanted: str | None = None) -> str:
        """The next token. Raises Unknown unless it is the wanted one."""
        token = self.next()
        if not token or wanted is not None and token != wanted:
            raise Unknown(f"{token or 'nothing'} in place of {wanted or 'a value'}")
        self.place += 1
        return token

    def sum(self, closed_by: str = "") -> mpmath.mpc:
        total = self.product(closed_by)
        while self.next() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            total += sign * self.product(closed_by)
        return total

    def product(self, closed_by: str = "") -> mpmath.mpc:
        found = self.factor()
        while (token := self.next()) and token != closed_by:
            if token in ("*", "/"):
                self.take()
                right = self.factor()
                found = found * right if token == "*" else found / right
            elif token in "+-" or token in BRACKETS.values() and token != "|":
                break
            elif NUMBER.fullmatch(token):
                raise Unknown("two numbers without a sign between them")
            else:
                found *= self.power()
        return found

    def factor(self) -> mpmath.mpc:
        if self.next() in ("+", "-"):
            return self.factor() if self.take() == "+" else -self.factor()
        return self.power()

    def power(self) -> mpmath.mpc:
        base = self.atom()
        while self.next() in ("!", "%"):
            base = factorial(base) if self.take() == "!" else base / 100
        if self.next() == "^":
            self.take()
            base = base ** self.argument(signed=True)
        return base

    def argument(self, signed: bool = False) -> mpmath.mpc:
        """What a command takes: a group in braces, or one digit, letter or command."""
        if self.next() in ("{", "("):
            return self.atom()
        if signed and self.next() == "-":
            self.take()
            return -self.argument()
        token = self.next()
        if NUMBER.fullmatch(token) and len(token) > 1:  # \frac12 is one half, and 2^10 means 2^1 0
            self.tokens[self.place : self.place + 1] = [token[0], token[1:]]
        return self.atom()

    def group(self, opening: str) -> mpmath.mpc:
        closing = BRACKETS[opening]
        inside = self.sum(closing)
        self.take(closing)
        return abs(inside) if opening == "|" else inside

    def atom(self) -> mpmath.mpc:
        token = self.take()
        if NUMBER.fullmatch(token):
            return self.mixed(token)
        if token in BRACKETS:
            return self.group(token)
        if token == r"\frac":
            top = self.argument()
            return top / self.argument()
        if token == r"\binom":
            top = self.argument()
            return mpmath.binomial(top, self.argument())
        if token == r"\sqrt":
            degree = mpmath.mpc(2)
            if self.next() == "[":
                degree = self.group(self.take())
            radicand = self.argument()
            return real_root(radicand, degree)
        if token in FUNCTIONS:
            return self.function(token)
        if token in CONSTANTS:
            return mpmath.mpc(CONSTANTS[token])
        if re.fullmatch(r"[A-Za-z]", token) or GREEK.fullmatch(token):
            return self.letter(self.subscripted(token))
        raise Unknown(token)

    def mixed(self, token: str) -> mpmath.mpc:
        """A number, with the fraction right after it: 1\\frac{4}{5} is nine fifths."""
        whole = mpmath.mpc(mpmath.mpf(token))
        rest = self.tokens[self.place : self.place + 7]
        is_fraction = len(rest) == 7 and rest[:2] == [r"\frac", "{"] and rest[3:5] == ["}", "{"] and rest[6] == "}"
        if "." not in token and is_fraction and rest[2].isdigit() and rest[5].isdigit():
            return whole + self.atom()
        return whole

    def subscripted(self, name: str) -> str:
        if self.next() != "_":
            return name
        self.take()
        if self.next() != "{":
            return f"{name}_{self.take()}"
        end = self.tokens.index("}", self.place) if "}" in self.tokens[self.place :] else None
        if end is None:
            raise Unknown("an open subscript")
        name += "_" + "".join(self.tokens[self.place + 1 : end])
        self.place = end + 1
        return name

    def function(self, name: str) -> mpmath.mpc:
        base = exponent = None
        if self.next() == "_":
            self.take()
            base = self.argument()
        if self.next() == "^":
            self.take()
            exponent = self.argument(signed=True)
        inside = self.atom() if self.next() in ("(", "{", "[") else self.plain_product()
        if base is not None and name != r"\log" or exponent is not None and exponent.real < 0:  # sin^{-1}: two meanings
            raise Unknown(name)
        found = FUNCTIONS[name](inside) / (1 if base is None else mpmath.log(base))
        return found if exponent is None else found**exponent

    def plain_product(self) -> mpmath.mpc:
        """A function's argument without brackets: \\sin 2x is the sine of 2x."""
        found = self.power()
        while re.fullmatch(r"[A-Za-z]|\\pi|\\frac|\\sqrt", self.next()) or GREEK.fullmatch(self.next()):
            found *= self.power()
        return found


def factorial(value: mpmath.mpc) -> mpmath.mpc:
    if value.imag or value.real != int(value.real) or not 0 <= value.real <= LARGEST_FACTORIAL:
        raise Unknown(f"{value}!")
    return mpmath.mpc(mpmath.factorial(value.real))


def real_root(value: mpmath.mpc, degree: mpmath.mpc) -> mpmath.mpc:
    """A root; an odd one of a negative number is negative."""
    odd = not degree.imag and degree.real == int(degree.real) and int(degree.real) % 2
    if odd and not value.imag and value.real < 0:
        return -((-value) ** (1 / degree))
    return value ** (1 / degree)
