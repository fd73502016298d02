"""The reader of LaTeX that stands beside math-verify, and both together in their process."""

import importlib.util
import threading

import pytest

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.evaluation import latex
from dsv3_lightning.evaluation.answers import check, check_expected
from dsv3_lightning.evaluation.expressions import equal_expressions
from dsv3_lightning.evaluation.latex import squeezed

SAME = [
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac12", "1/2"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"4\sqrt(2)", r"\sqrt{32}"),
    (r"1-\frac{1}{\mathrm{e}}", "1-1/e"),
    (r"x^2-1", "(x-1)(x+1)"),
    (r"\{1,2\}", r"\{2, 1\}"),
    (r"1,2", r"2 \text{ and } 1"),
    (r"\left(3,\frac{\pi}{2}\right)", r"(3, \pi/2)"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2)"),
    (r"2x-4=0", "x = 2"),
    ("x=5", "5"),
    (r"x \geq 2", r"2 \le x"),
    (r"1\frac{4}{5}", r"\frac{9}{5}"),
    (r"90^\circ", "90"),
    (r"3\text{ cm}", "3"),
    (r"\begin{pmatrix} 1/2 \\ 3 \end{pmatrix}", r"\begin{pmatrix} 0.5 \\ 3 \end{pmatrix}"),
    ("10,000", r"10{,}000"),
    (r"3 \pm \sqrt{2}", r"3+\sqrt{2}, 3-\sqrt{2}"),
    (r"\sqrt[3]{-8}", "-2"),
    (r"\log_2 8", "3"),
    (r"\binom{5}{2}", "10"),
    (r"10\%", "0.1"),
]
ONLY_OURS = [(r"2x-4=0", "x = 2"), (r"\sqrt[3]{-8}", "-2")]  # what math-verify tells apart is wrong
DIFFERENT = [
    ("4", r"4\sqrt(2)"),
    (r"1-\frac{1}{e}", r"1+1/\mathrm{e}"),
    ("2^{-99}", "2^{-98}"),
    ("3*x-1*y+13=0", "3x+4y+14=0"),
    ("10", r"10\%"),
    ("9", "1, 2, 9"),
    ("(1,2)", "(2,1)"),
    ("[1,2)", "[1,2]"),
    ("x=5", "y=5"),
    (r"\frac{1}{3}", "0.333333"),
    (r"2\pi", "6.283185"),
    ("1000000", "1000001"),
    ("x+1", "y+1"),
    ("-5", "5"),
    (r"x \le 2", r"x \ge 2"),
    (r"3\text{ cm}", r"3\text{ m}"),
    (r"\sqrt{2}", r"-\sqrt{2}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"),
    (r"\{1,2\}", r"\{1,2,2\}"),
    (r"3 \pm 2", "5"),
]
UNREADABLE = [("7", text) for text in ("", "1 2 3", "7 7", "?", r"\foo", "(7", "7)", "7+", r"\frac{7}", "x=x", "0/0")]


@pytest.mark.parametrize(("a", "b"), SAME)
def test_two_spellings_of_one_value_are_equal(a: str, b: str):
    assert equal_expressions(a, b) is equal_expressions(b, a) is True


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_different_values_are_not_equal(a: str, b: str):
    assert equal_expressions(a, b) is equal_expressions(b, a) is False


@pytest.mark.parametrize(("a", "b"), UNREADABLE)
def test_what_is_not_an_expression_is_not_read(a: str, b: str):
    assert not equal_expressions(a, b)


def test_space_between_digits_is_kept():
    assert squeezed("1 2 3") != squeezed("123")
    assert squeezed(r"\left( 1,\, x \right)") == "(1,x)"


def test_a_missing_library_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs math-verify; pip install 'dsv3-lightning\[eval\]'"):
        check_expected("math", "1")


needs_library = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math-verify")


@needs_library
@pytest.mark.slow
def test_both_readings_in_their_process_fail_closed_and_outlive_what_hangs():
    checker = latex.MathChecker(seconds=1)
    try:
        for a, b in SAME:
            wanted = "wrong" if (a, b) in ONLY_OURS else "right"
            assert checker.same(a, b) == checker.same(b, a) == wanted, (a, b)
        for a, b in DIFFERENT:
            assert checker.same(a, b) == checker.same(b, a) == "wrong", (a, b)
        for a, b in UNREADABLE:
            assert checker.same(b, a) != "right", (a, b)
        for tower in ("2003^{2002^{2001}}", "9^{9^{9^{9^9}}}"):
            assert checker.same(tower, "1") != "right"
            assert checker.same(r"\frac{1}{2}x", "x/2") == "right"  # in a new process
    finally:
        checker.stop()


@needs_library
@pytest.mark.slow
def test_waiting_for_others_does_not_count_and_every_thread_may_ask():
    checker, found = latex.MathChecker(seconds=1), []
    threads = [
        threading.Thread(target=lambda: found.append(checker.same(r"\sqrt{8}", r"2\sqrt{2}"))) for _ in range(40)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        checker.stop()
    assert found == ["right"] * 40


@needs_library
@pytest.mark.slow
def test_mathematical_answers_are_read_from_boxes():
    for text in (r"so $\boxed{\frac{\sqrt{8}}{2}}$.", r"<think>\boxed{3}</think> The answer is $\sqrt{2}$."):
        assert check("math", text, r"\sqrt2") == "right"
    assert check("math", r"\boxed{\sqrt2} or \boxed{3}", r"\sqrt2") == "wrong"
    assert check("math", r"\boxed{}", r"\sqrt2") == "wrong"
    assert check("math", "I give up\nhere", r"\sqrt2") == "unreadable"
