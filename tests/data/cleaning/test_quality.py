"""Every quality rule on texts whose measure is worked out by hand."""

import pytest

from dsv3_lightning.config.compose import PRESETS, read_yaml
from dsv3_lightning.data.cleaning import config
from dsv3_lightning.data.cleaning.c4 import without_lines
from dsv3_lightning.data.cleaning.facts import Facts
from dsv3_lightning.data.cleaning.quality import RULES, judge

PUBLISHED = read_yaml(PRESETS / "cleaning.yaml")["data"]["cleaning"]["quality"]  # type: ignore[arg-type]
ENGLISH = (
    "The committee met in the old town hall to discuss the new bridge over the river. Everyone had read the report, "
    "and most of them agreed with it. Some of the members asked how much it would cost. The mayor said that nobody "
    "could know that yet. They decided to meet again in May, when the engineers will have finished their survey."
)
CHINESE = (
    "委员会在旧市政厅开会，讨论横跨河流的新桥。大家都读过报告，大多数人表示同意。有些成员询问需要多少费用。"
    "市长说，目前还没有人知道。他们决定五月再次开会，届时工程师将完成勘测。会议还讨论了公园的改建方案，并且听取了"
    "居民代表的意见。代表们希望保留老树，同时增加座椅和照明。最后，主席感谢所有人参加，并宣布下次会议的时间和地点。"
)
CODE = "def add(a, b):\n    return a + b\n\n\nclass Sum:\n    def __init__(self):\n        self.total = {}\n"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("min_words", "one two, three - 数据", 5),
        ("max_mean_word_chars", "a bcd 数据", (1 + 3 + 1 + 1) / 4),
        ("max_hashes_per_word", "# one ## two three four", 3 / 4),
        ("max_ellipses_per_word", "one... two… three four", 2 / 4),
        ("max_bullet_lines", "- a\n• b\n\nc\n* d", 3 / 4),
        ("max_ellipsis_lines", "a ...\nb\nc…  \n\nd", 2 / 4),
        ("min_words_with_letters", "a 1 2b 33", 2 / 4),
        ("min_stop_words", "The THE of a theory", 2),
        ("max_duplicate_lines", "x\nyy\n x \nx", 2 / 4),
        ("max_duplicate_line_chars", "x\nyy\nx\nx", 2 / 5),
        ("max_duplicate_paragraphs", "x\ny\n\nz\n\nx\ny", 1 / 3),
        ("max_duplicate_paragraph_chars", "x\ny\n\nz\n\nx\ny", 3 / 7),
        ("max_top_2gram_chars", "a bb a bb a cc", 6 / 9),  # `a bb` twice, 3 characters
        ("max_top_2gram_chars", "a b c d e", 0),  # none repeats
        ("max_top_3gram_chars", "a b c a b c x", 6 / 7),
        ("max_duplicate_5gram_chars", "a b c d e X a b c d e", 5 / 11),
        ("max_duplicate_5gram_chars", "a b c d e f X a b c d e f", 6 / 13),  # two runs that overlap count once
        ("max_lorem_ipsum", "Lorem ipsum dolor, lorem IPSUM", 2),
        ("max_curly_brackets", "{{}", 2),
        ("min_sentences", 'One. Two? "Three!" Four', 4),
        ("min_sentences", "一。二！三", 3),
        ("min_sentences", "Version 1.2 is out.", 1),
        ("min_punctuated_lines", "One.\ntwo\n三。\n“four”", 3 / 4),
        ("max_short_lines", f"{'x' * 30}\n{'x' * 31}\n\nshort", 2 / 3),
        ("max_newlines_per_word", "a b\n\nc d", 2 / 4),
        ("max_line_chars", "ab\nabcd\n", 4),
        ("max_mean_line_chars", "ab\nabc", 6 / 2),
        ("min_alphanumeric_chars", "ab + 数", 3 / 6),
    ],
)
def test_a_measure(name: str, text: str, value: float) -> None:
    others = ["", "some other text, some other text", "数据", "-"]
    for texts in ([text], [*others, text], [text, *others]):
        assert RULES[name](Facts(texts))[texts.index(text)] == pytest.approx(value)


@pytest.mark.parametrize("name", RULES)
def test_a_threshold_itself_passes(name: str) -> None:
    value = float(RULES[name](Facts([ENGLISH]))[0])
    outside = value + 1 if name.startswith("min_") else value - 1
    assert judge([ENGLISH], {name: value}) == [None]
    assert judge([ENGLISH, ""], {name: outside})[0] == name


def test_the_rules_of_yaml_are_those_of_the_code() -> None:
    assert tuple(RULES) == config.RULES
    used = {name for rules in PUBLISHED.values() for name in rules}
    assert used | {"min_stop_words"} == set(RULES) | set(config.LINE_RULES)


@pytest.mark.parametrize(
    ("rules", "text"),
    [("web_en", ENGLISH), ("web_zh", CHINESE), ("prose", ENGLISH), ("prose", CHINESE), ("code", CODE)],
)
def test_good_text_of_each_kind_passes_its_rules(rules: str, text: str) -> None:
    assert judge([text], PUBLISHED[rules]) == [None]


def test_english_limits_would_drop_chinese_and_code() -> None:
    assert judge([CHINESE, CODE], PUBLISHED["web_en"]) == ["min_mean_word_chars", "min_words"]


@pytest.mark.parametrize(
    ("rules", "text", "reason"),
    [
        ("web_en", "Buy now. " * 40, "min_stop_words"),
        ("web_en", ENGLISH + " function() { return 1; }", "max_curly_brackets"),
        ("web_en", "\n".join([ENGLISH] * 3), "max_duplicate_lines"),
        ("web_en", ENGLISH.replace(".", ""), "min_sentences"),
        ("web_zh", CHINESE[:50], "min_words"),
        ("web_zh", CHINESE + "lorem ipsum", "max_lorem_ipsum"),
        ("code", "x = [" + "0, " * 500 + "]", "max_line_chars"),
        ("code", "+ - * / = ( ) [ ] ; , . < > a\n" * 5, "min_alphanumeric_chars"),
    ],
)
def test_bad_text_breaks_the_rule_that_is_named(rules: str, text: str, reason: str) -> None:
    assert judge([text], PUBLISHED[rules]) == [reason]


def test_lines_are_removed_as_c4_has_it() -> None:
    text = "Too short\nThis line has four words\n\nPlease enable JavaScript in your browser\nanother line that stays"
    assert without_lines(text, 3, None, True) == "This line has four words\n\nanother line that stays"
    assert without_lines("中文没有空格", None, 1000, True) == "中文没有空格"
    assert without_lines("a b c " + "x" * 1001, 3, 1000, False) == ""
    assert without_lines("  kept as it is \n\n", None, None, True) == "  kept as it is \n\n"
