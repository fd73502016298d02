"""Checking of answers: pairs that fooled other checkers, and the numbers of verdicts."""

import random
import threading

import pytest

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.evaluation.answers import CHECKERS, Tally, check, check_all, check_expected, final_answers
from dsv3_lightning.evaluation.words import best_common_words

ALL = sorted(set(CHECKERS) - {"math"})


@pytest.mark.parametrize("checker", ALL)
@pytest.mark.parametrize("text", ["", "  \n", r"\boxed{}", "####", "Answer:", "$$", ".", "**"])
def test_an_empty_answer_is_never_right(checker: str, text: str):
    assert check(checker, text, "7") != "right"
    assert check(checker, text, "") != "right"  # "" is a part of every text


@pytest.mark.parametrize("text", ["", " ", r"\boxed{}", r"\boxed{ }"])
def test_an_empty_answer_is_wrong_and_not_unreadable(text: str):
    assert check("integer", text, "7") == "wrong"


@pytest.mark.parametrize("checker", ALL)
@pytest.mark.parametrize(
    "text",
    ["A or B or C", "7 or 8", "7, 8", "7 8", "7/8/9", "1 2 3 4 5 6 7", r"\boxed{7} or \boxed{8}", "7 = 8", "7-8"],
)
def test_several_or_contradictory_answers_are_never_right(checker: str, text: str):
    for answer in ("7", "8", "A", "B", "C", "1", "9"):
        assert check(checker, text, answer) != "right"


@pytest.mark.parametrize("text", [r"\boxed{7} or \boxed{8}", "Answer: 7 or 8", r"\boxed{7, 8}", "#### 7 8"])
def test_several_numbers_are_wrong(text: str):
    assert check("integer", text, "7") == check("number", text, "8") == "wrong"


@pytest.mark.parametrize("gold", ["", "x", "about 7", "7 or 8"])
def test_an_expected_answer_that_can_not_be_read_makes_nothing_right_and_is_refused(gold: str):
    for checker in ("integer", "number"):
        for text in ("", gold, "7", rf"\boxed{{{gold}}}"):
            assert check(checker, text, gold) != "right"
        with pytest.raises(ConfigError, match="answer"):
            check_expected(checker, gold)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("$29.00", "29"),
        (r"\$29", "29.00"),
        ("−5", "-5"),
        ("– 5", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("1,234", "1234"),
        ("1{,}234", "1234"),
        ("1,234,567.50", "1234567.5"),
        ("007", "7"),
        ("７", "7"),
        ("10%", "0.1"),
        (r"10\%", "0.1"),
        ("50 percent", "1/2"),
        (r"\frac{3}{4}", "0.75"),
        (r"\dfrac{-3}{4}", "-0.75"),
        ("1e3", "1000"),
        ("x = 5", "5"),
        ("$5$", "5"),
        (r"\(5\)", "5"),
        ("**5**", "5"),
        ("5.", "5"),
        (".5", "0.5"),
        ("+5", "5"),
    ],
)
def test_a_number_is_read_in_each_of_its_spellings(text: str, number: str):
    assert check("number", text, number) == check("number", number, text) == "right"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5", "-5"),
        ("-5", "5"),
        ("29", "29.01"),
        ("10", "10%"),
        ("10%", "10"),
        ("0.1", "10"),
        ("1234", "1.234"),
        ("1,23", "123"),
        ("12,34", "1234"),
        ("1.234.567", "1234567"),
        ("5²", "52"),
        ("2^5", "25"),
        ("1 000", "1"),
        ("1 000", "0"),
        ("0.30000000000000004", "0.3"),
        ("123456789012345678901", "123456789012345678900"),
        ("12", "1"),
        ("12", "2"),
        ("112", "12"),
        ("1/0", "1"),
        ("nan", "nan"),
        ("inf", "inf"),
        ("1e99999999", "1"),
        ("9" * 5000, "9"),
        ("5 or -5", "5"),
        ("±5", "5"),
        ("5!", "5"),
        ("5 million", "5"),
        ("five", "5"),
        ("--5", "5"),
        ("-$-5", "5"),
        ("1_000", "1000"),
        ("٣", "3"),
        ("True", "1"),
    ],
)
def test_another_number_or_none_is_not_right(text: str, number: str):
    assert check("number", text, number) != "right"


def test_an_integer_that_is_not_whole_is_wrong():
    assert [check("integer", text, "42") for text in ("42.0", "42.5", "85/2", "84/2")] == [
        "right",
        "wrong",
        "wrong",
        "right",
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("#### 5\n\nQuestion: next? #### 7", ["5"]),  # a model that runs on after its answer
        ("2 + 3 = 5\n#### 5 \nand then 9", ["5 "]),
        ("First I try Answer: 3, no.\nAnswer: 4", ["4"]),  # the first one is inside the reasoning
        ("Answer: 3, no.\nThe final answer is 4.", ["4."]),
        ("**Answer:** 4", ["4"]),
        ("Answer:\n4", ["4"]),
        ("Final Answer: The final answer is $4$. I hope it is correct.", ["$4$"]),
        ("<think>\\boxed{3}</think>\\boxed{4}", ["4"]),
        ("<think>so \\boxed{4}", []),  # reasoning that never ended
        (r"\boxed{\frac{1}{2}}", [r"\frac{1}{2}"]),
        (r"\boxed{\{1,2\}}", [r"\{1,2\}"]),
        (r"\boxed 4", ["4"]),
        (r"\boxed{4", []),  # cut off at the limit of tokens
        (r"Answer: 3, in a box \boxed{4}", ["4"]),
        ("12", ["12"]),
        ("12 apples\nand 13", []),  # never the last number
        ("The answers are hard", ["The answers are hard"]),
    ],
)
def test_the_final_answer_is_the_one_that_the_text_marks(text: str, found: list[str]):
    assert final_answers(text) == found


def test_a_short_text_is_compared_whole():
    assert check("text", "  (paris). ", "Paris") == check("text", "Answer: “New  York”", "new york") == "right"
    for text in ("Paris or London", "not Paris", "Pari", "", "P", "Paris, France"):
        assert check("text", text, "Paris") == "wrong"
    assert check("text", "-5", "5") == check("text", "C++", "C") == "wrong"  # signs are no punctuation
    assert check("text", "NYC", ["New York", "NYC"]) == "right"
    assert check("text", "", ["", "NYC"]) == "wrong"


def test_an_exact_answer_is_the_whole_text():
    assert check("exact", " 4 2\n", "4 2") == "right"
    assert check("exact", r"\boxed{4 2}", "4 2") == check("exact", "42", "4 2") == check("exact", "", "4 2") == "wrong"


def test_every_text_has_one_verdict_in_its_place_whatever_it_is():
    rng = random.Random(1)
    pieces = [
        "7",
        "-",
        "\\boxed{",
        "}",
        "####",
        "Answer:",
        "<think>",
        "</think>",
        "\n",
        "\\frac",
        "{",
        "%",
        "$",
        "é",
        "\0",
    ]
    texts = ["".join(rng.choices(pieces, k=rng.randrange(12))) for _ in range(2000)]
    for checker in ALL:
        verdicts = check_all(checker, texts, ["7"] * len(texts))
        assert verdicts == [check(checker, text, "7") for text in texts]
        assert Tally.of(verdicts).total == len(texts)
    with pytest.raises(ConfigError, match="2 texts to check and 1 answers"):
        check_all("integer", ["1", "2"], ["1"])


def test_an_unknown_checker_is_one_line_that_names_the_valid_ones():
    with pytest.raises(
        ConfigError, match="checker 'latex': no such checker; valid: integer, number, text, words, exact, math"
    ):
        check("latex", "1", "1")


def test_a_text_that_decides_nothing_is_unreadable():
    for text in ("I don't know\nsorry", "no idea", "<think> 7", r"\boxed{7"):
        assert check("integer", text, "7") == "unreadable"


def test_a_checker_works_in_any_thread():
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(check("integer", "7", "7")))
    thread.start()
    thread.join()
    assert found == ["right"]


@pytest.mark.parametrize(
    ("text", "accepted", "verdict", "f1"),
    [
        ("The  U.S. Dollar.", ["dollar", "US dollar"], "right", 1.0),
        ("Answer: a Eiffel tower\nAnd more", ["The Eiffel Tower"], "right", 1.0),
        ("the tower", ["The Eiffel Tower"], "wrong", 2 / 3),
        ("tower tower tower tower", ["Eiffel Tower"], "wrong", 2 * 1 / 6),
        ("", ["Eiffel Tower"], "wrong", 0.0),
        ("the", ["a"], "wrong", 0.0),  # nothing but articles is not equal to other articles
        ("...", ["Eiffel"], "wrong", 0.0),
        ("7", ["-7"], "wrong", 0.0),
        ("15", ["1.5"], "wrong", 0.0),
        ("$1,000", ["1000."], "right", 1.0),
        (r"\boxed{Rome} or \boxed{Paris}", ["Rome"], "wrong", 0.0),  # two final answers count as the worse one
    ],
)
def test_words_are_compared_normalized_and_by_the_words_in_common(text, accepted, verdict, f1):
    assert check("words", text, accepted) == verdict
    assert best_common_words(final_answers(text), accepted) == pytest.approx(f1)
