"""CleaningConfig: what happens to documents before they become tokens. Imports no torch and no NumPy."""

from dataclasses import dataclass
from typing import Literal

from dsv3_lightning.common.paths import PathText
from dsv3_lightning.common.wording import nearest
from dsv3_lightning.errors import ConfigError

Rules = dict[str, float | bool | None]

LINE_RULES = ("min_words_per_line", "max_word_chars_per_line", "drop_boilerplate_lines")  # remove lines, not documents
RULES = (
    "min_words", "max_words", "min_mean_word_chars", "max_mean_word_chars", "max_hashes_per_word",
    "max_ellipses_per_word", "max_bullet_lines", "max_ellipsis_lines", "min_words_with_letters", "min_stop_words",
    "max_duplicate_lines", "max_duplicate_line_chars", "max_duplicate_paragraphs", "max_duplicate_paragraph_chars",
    "max_top_2gram_chars", "max_top_3gram_chars", "max_top_4gram_chars", "max_duplicate_5gram_chars",
    "max_duplicate_6gram_chars", "max_duplicate_7gram_chars", "max_duplicate_8gram_chars", "max_duplicate_9gram_chars",
    "max_duplicate_10gram_chars", "max_lorem_ipsum", "max_curly_brackets", "min_sentences", "min_punctuated_lines",
    "max_short_lines", "max_newlines_per_word", "max_line_chars", "max_mean_line_chars", "min_alphanumeric_chars",
)  # fmt: skip


def check_rules(where: str, rules: Rules) -> None:
    """Raises ConfigError for a rule that doesn't exist, or a threshold of the wrong kind."""
    for name, threshold in rules.items():
        if name not in LINE_RULES + RULES:
            raise ConfigError(f"{where}.{name}: no such rule{nearest(name, LINE_RULES + RULES, f'{where}.')}")
        if threshold is not None and isinstance(threshold, bool) != (name == "drop_boilerplate_lines"):
            kind = "true or false" if name == "drop_boilerplate_lines" else "a number"
            raise ConfigError(f"{where}.{name}={threshold}: must be {kind}")


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Language identification. Raises ConfigError.

    threshold: the least probability of a source's language; documents below it, or of another language, are dropped.
    """

    threshold: float

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"data.cleaning.languages.threshold={self.threshold}: must be in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class NearConfig:
    """Near-duplicate removal by MinHash (FineWeb §3). Raises ConfigError.

    buckets, rows: documents are duplicates if all `rows` values of one of the `buckets` are equal. ngram: words of the
    runs that are compared.
    """

    buckets: int
    rows: int
    ngram: int

    def __post_init__(self) -> None:
        for name in ("buckets", "rows", "ngram"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.cleaning.near.{name}={getattr(self, name)}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class DecontaminationConfig:
    """Removal of documents that share a run of words with an evaluation set. Raises ConfigError.

    paths: the sets, as .jsonl (every text of every field) or .txt (every paragraph). ngram: words of a run; cjk_ngram:
    the same in texts that are mostly Chinese characters or kana, each of which is a word.
    """

    paths: list[PathText]
    ngram: int
    cjk_ngram: int

    def __post_init__(self) -> None:
        for name in ("ngram", "cjk_ngram"):
            if getattr(self, name) < 5:
                raise ConfigError(f"data.cleaning.decontaminate.{name}={getattr(self, name)}: must be at least 5")


@dataclass(frozen=True, kw_only=True)
class CleaningConfig:
    """What happens to documents before they become tokens, in this order. Raises ConfigError.

    repair: repair Unicode of documents that show signs of damage; code stays as it is.
    languages: identification of languages; None: documents have the language of their source.
    quality: sets of rules by name, of which a source's `filters` names one. The set NAME_LANGUAGE judges documents of
        that language in place of NAME.
    pii: mask e-mail addresses and public IPv4 addresses.
    exact: drop documents that differ from an earlier one at most in white space.
    near: drop near duplicates of an earlier document.
    scope: whether duplicates are looked for over all sources or within each.
    decontaminate: drop documents that share a run of words with an evaluation set.
    """

    repair: bool
    languages: LanguageConfig | None
    quality: dict[str, Rules]
    pii: bool
    exact: bool
    near: NearConfig | None
    scope: Literal["global", "source"]
    decontaminate: DecontaminationConfig | None

    def __post_init__(self) -> None:
        for name, rules in self.quality.items():
            check_rules(f"data.cleaning.quality.{name}", rules)
