"""Both stages of cleaning on a small corpus with planted faults: what stays, what is counted, what is done again."""

import dataclasses
import errno
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv3_lightning.common.typed import build
from dsv3_lightning.config.compose import PRESETS, read_yaml
from dsv3_lightning.data.cleaning import stage
from dsv3_lightning.data.cleaning.config import CleaningConfig
from dsv3_lightning.data.cleaning.corpus import Cleaned, clean, plan
from dsv3_lightning.data.config import DataConfig, SourceConfig
from dsv3_lightning.data.stages.tasks import Shard
from dsv3_lightning.data.text.corpus import lines_of, read_documents
from dsv3_lightning.data.text.prepare import prepare
from dsv3_lightning.data.text.report import report
from dsv3_lightning.data.text.sources import sources_of
from dsv3_lightning.data.text.store import TokenFile, read_manifest
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError

MakeConfig = Callable[..., DataConfig]
PUBLISHED = read_yaml(PRESETS / "cleaning.yaml")["data"]["cleaning"]  # type: ignore[arg-type]
NO_MODEL: dict[str, Any] = {**PUBLISHED, "languages": None, "repair": False}  # without libraries of the extra
QUESTION = "How many clips did Natalia sell altogether in April and May if she sold half as many in May?"
rng = random.Random(0)
WORDS = [f"word{number}" for number in range(400)]


def essay(words: int = 120) -> str:
    return ". ".join(" ".join(rng.choices(WORDS, k=10)) for _ in range(words // 10)) + "."


ESSAYS = [essay() for _ in range(12)]
NEAR = ESSAYS[3].replace("word", "WORD", 3) + " One more sentence."
CHAT = [{"role": "user", "content": "Write to me at ann@site.org."}, {"role": "assistant", "content": "I did."}]


@pytest.fixture
def corpus(tmp_path: Path, make_config: MakeConfig) -> DataConfig:
    books = [*ESSAYS[:6], ESSAYS[0].replace(" ", "\n "), NEAR, "too short", f"{essay()} {QUESTION.upper()}"]
    (tmp_path / "books").mkdir()
    for number, text in enumerate(books):
        (tmp_path / "books" / f"{number:02}.txt").write_text(text, encoding="utf-8")
    lines = [{"text": text} for text in (*ESSAYS[6:], ESSAYS[1])] + [{"text": CHAT}, {"text": CHAT}]
    (tmp_path / "web.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    (tmp_path / "questions.jsonl").write_text(json.dumps({"question": QUESTION}), encoding="utf-8")
    sources = {
        "books": SourceConfig(paths=[str(tmp_path / "books")], filters={"min_words": 5.0}),
        "web": SourceConfig(paths=[str(tmp_path / "web.jsonl")]),
    }
    sets = {"paths": [str(tmp_path / "questions.jsonl")], "ngram": 13, "cjk_ngram": 24}
    cleaning = build(CleaningConfig, {**NO_MODEL, "decontaminate": sets})
    return make_config(tmp_path, paths=[], sources=sources, cleaning=cleaning, validation_fraction=0.0)


def cleaned(config: DataConfig, **how: Any) -> Cleaned:
    found = clean(plan(config, sources_of(config)), **how)
    assert found is not None
    return found


def texts(config: DataConfig, **how: Any) -> list[tuple[str, Any]]:
    return [(file.origin, document) for file in cleaned(config, **how).files for document in read_documents([file], "")]


def changed(config: DataConfig, **changes: Any) -> DataConfig:
    assert config.cleaning is not None
    return dataclasses.replace(config, cleaning=dataclasses.replace(config.cleaning, **changes))


def test_what_stays_is_what_was_not_planted(corpus: DataConfig) -> None:
    found = texts(corpus)
    assert found[:6] == [("books", text) for text in ESSAYS[:6]]
    assert found[6:12] == [("web", text) for text in ESSAYS[6:]]
    ((origin, chat),) = found[12:]
    assert origin == "web" and [message.role for message in chat] == ["user", "assistant"]
    assert "ann@site.org" not in chat[0].text and [message.learned for message in chat] == [False, True]


def test_every_document_is_counted_once(corpus: DataConfig) -> None:
    counts = cleaned(corpus).counts
    (books,), (web,) = counts["books"]["clean"], counts["web"]["clean"]
    assert books["documents"] == {"read": 10, "kept": 8, "quality: min_words": 1, "contaminated": 1}
    assert counts["books"]["join"]["documents"] == {"stays": 6, "exact": 1, "near": 1}
    assert web["documents"] == {"read": 9, "kept": 9} and web["changed"] == {"pii": 2}
    assert counts["web"]["join"]["documents"] == {"stays": 7, "exact": 2}
    assert books["bytes"]["read"] == sum(
        path.stat().st_size for path in Path(corpus.cache_dir, "..", "books").iterdir()
    )
    assert counts["books"]["join"]["examples"]["near"][0].strip('"').startswith(NEAR[:50])


def test_dropped_documents_are_written_with_their_reason(corpus: DataConfig) -> None:
    cleaned(corpus, keep_dropped=True)
    dropped = [json.loads(line) for path in sorted(Path(corpus.cache_dir).rglob("dropped.jsonl.zst"))
               for line in lines_of(path) if line]  # fmt: skip
    reasons = sorted(record["reason"] for record in dropped)
    assert reasons == ["contaminated", "exact", "exact", "exact", "near", "quality: min_words"]
    assert {"reason": "quality: min_words", "text": "too short"} in dropped
    assert texts(corpus, keep_dropped=True) == texts(corpus)


def test_duplicates_are_looked_for_within_each_source_on_request(corpus: DataConfig) -> None:
    found = texts(changed(corpus, scope="source"))
    assert ("web", ESSAYS[1]) in found and len(found) == len(texts(corpus)) + 1
    without = texts(changed(corpus, exact=False, near=None))
    assert len(without) == 17


def test_a_source_that_is_added_leaves_the_others_as_they_are(corpus: DataConfig, tmp_path: Path) -> None:
    texts(corpus)
    before = {path: path.stat().st_mtime_ns for path in Path(corpus.cache_dir).rglob("documents.jsonl.zst")}
    (tmp_path / "more.txt").write_text(essay(), encoding="utf-8")
    more = {**(corpus.sources or {}), "more": SourceConfig(paths=[str(tmp_path / "more.txt")])}
    assert len(texts(dataclasses.replace(corpus, sources=more))) == 14
    after = {path: path.stat().st_mtime_ns for path in Path(corpus.cache_dir).rglob("documents.jsonl.zst")}
    assert before.items() <= after.items() and len(after) == 3


def test_the_result_does_not_depend_on_tasks_or_interruptions(corpus: DataConfig, monkeypatch: Any) -> None:
    whole = texts(corpus)
    monkeypatch.setattr(stage, "TASK_BYTES", 2000)
    monkeypatch.setattr(stage, "BATCH", 1500)
    other = dataclasses.replace(corpus, cache_dir=corpus.cache_dir + "-2")
    real, calls = stage.clean_batch, []

    def fail(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(stage, "clean_batch", fail)
    with pytest.raises(KeyboardInterrupt):
        texts(other)
    first = {path: path.read_bytes() for path in Path(other.cache_dir).rglob("*.npy")}
    assert texts(other) == whole
    assert first and all(path.read_bytes() == content for path, content in first.items())


def test_two_jobs_write_what_one_does(corpus: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "TASK_BYTES", 2000)
    one = cleaned(corpus)
    other = dataclasses.replace(corpus, cache_dir=corpus.cache_dir + "-2")
    assert clean(plan(other, sources_of(other)), shard=Shard(0, 2)) is None
    two = clean(plan(other, sources_of(other)), shard=Shard(1, 2))
    assert two is not None and two.counts == one.counts
    for left, right in zip(one.files, two.files, strict=True):
        assert left.path.read_bytes() == right.path.read_bytes()
        assert left.marks is not None and right.marks is not None
        assert left.marks.read_bytes() == right.marks.read_bytes()


def test_a_full_disk_is_reported_and_leaves_nothing_half_written(
    corpus: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(stage.np, "save", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        with pytest.raises(ConfigError, match=r"clean-books-\w+/00000: can't be written \(No space left"):
            prepare(corpus)
    assert not list(Path(corpus.cache_dir).rglob("documents.jsonl.zst"))
    assert len(texts(corpus)) == 13


def test_tokens_are_those_of_the_cleaned_documents(corpus: DataConfig) -> None:
    assert corpus.sources is not None
    config = dataclasses.replace(corpus, sources={"books": corpus.sources["books"]})
    folder = prepare(config)
    tokens, tokenizer = TokenFile(folder, "train"), Tokenizer.from_file(folder)
    offsets = tokens.offsets()
    found = [
        tokenizer.decode(tokens.tokens[a:b].tolist(), skip_special_tokens=True) for a, b in zip(offsets, offsets[1:])
    ]
    assert sorted(found) == sorted(ESSAYS[:6]) and read_manifest(folder)["origins"] == ["books"]
    assert prepare(config) == folder
    assert prepare(changed(config, exact=False, near=None)) != folder


def test_the_report_tells_what_became_of_each_source(corpus: DataConfig) -> None:
    assert corpus.sources is not None
    books = dataclasses.replace(corpus.sources["books"], license="GPL-2", language="en")
    config = dataclasses.replace(corpus, sources={"books": books})
    folder = prepare(config)
    found = report(folder, config).read_text(encoding="utf-8")
    tokens = len(TokenFile(folder, "train").tokens)
    assert f"| books | 6 | 0 | {tokens:,} |" in found and "| en | GPL-2 |" in found
    for line in ("| read | 10 | 100.0% |", "| dropped: quality: min_words | 1 | 10.0% |", "| dropped: near | 1 |",
                 "| dropped: contaminated | 1 |", "| kept | 6 | 60.0% |", '- `"too short"`'):  # fmt: skip
        assert line in found, line
    assert (folder / "data_report.png").stat().st_size > 1000
    whole = dataclasses.replace(config, cleaning=None)
    assert "| books | 10 |" in report(prepare(whole), whole).read_text(encoding="utf-8")


def test_faults_of_files_are_reported_after_cleaning_too(corpus: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "one \xff two"}\nnonsense\n{"text": "' + b"x" * 900 + b'"}\n')
    sources = {"bad": SourceConfig(paths=[str(tmp_path / "bad.jsonl")])}
    config = dataclasses.replace(corpus, sources=sources, skip_bad_lines=True, max_document_bytes=500)
    found = report(prepare(config), config).read_text(encoding="utf-8")
    for line in (
        "data.sources: left out (data.skip_bad_lines): 1 bad lines: 1 in bad/bad.jsonl",
        "U+FFFD stands for 1 characters: 1 in bad/bad.jsonl",
        "bad/bad.jsonl, line 3",
    ):
        assert line in found, found


def test_nothing_left_is_an_error_that_says_so(corpus: DataConfig) -> None:
    assert corpus.sources is not None
    none = {"books": dataclasses.replace(corpus.sources["books"], filters={"min_words": 1e6})}
    with pytest.raises(ConfigError, match="data.cleaning: no document of books is left"):
        prepare(dataclasses.replace(corpus, sources=none))


def test_the_published_settings_are_complete() -> None:
    """The packages aren't needed to check them."""
    assert build(CleaningConfig, PUBLISHED).near is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filters": "wbe"}, "data.sources.web.filters=wbe: no such set in data.cleaning.quality; did you mean web?"),
        ({"filters": {"min_word": 3.0}}, "data.sources.web.filters.min_word: no such rule; did you mean .*min_words?"),
    ],
)
def test_filters_that_do_not_exist_are_refused(corpus: DataConfig, changes: dict[str, Any], message: str) -> None:
    assert corpus.sources is not None
    web = dataclasses.replace(corpus.sources["web"], **changes)
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(corpus, sources={"web": web})


def test_cleaning_needs_named_sources(corpus: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data.cleaning: needs data.sources"):
        dataclasses.replace(corpus, sources=None, paths=[str(tmp_path)])
