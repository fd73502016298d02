"""What is read from files, and what is said about files that can't be read."""

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import zstandard

from dsv3_lightning.data.config import DEFAULTS
from dsv3_lightning.data.text import corpus
from dsv3_lightning.data.text.corpus import read_documents, split_lines
from dsv3_lightning.data.text.sources import Source, find_sources, main_origins
from dsv3_lightning.data.text.tally import ReadStats, notes
from dsv3_lightning.errors import ConfigError

TEXTS = ["one\r\ntwo\r\n", "数据 🙂", '\ttabs \\ "quotes" \u2028 line separator', "x" * 3_000_000]

TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
NOISE = [os.urandom(500).hex() for _ in range(1000)]


def read(*paths: Path, text_key: str = "text", stats: ReadStats | None = None) -> list[str]:
    return list(read_documents(find_sources([str(path) for path in paths]), text_key, stats))


def jsonl(texts: list[str], key: str = "text") -> bytes:
    return "\n".join(json.dumps({"id": 7, key: text}, ensure_ascii=False) for text in texts).encode()


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_lines_are_read_whatever_the_compression(tmp_path: Path, suffix: str) -> None:
    data = jsonl(TEXTS)
    halves = (
        data[: len(data) // 2],
        data[len(data) // 2 :],
    )  # two members or frames in one file, as `cat a.gz b.gz` makes
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(suffix[6:], bytes)
    path = tmp_path / f"data{suffix}"
    path.write_bytes(b"".join(pack(half) for half in halves))
    assert read(path) == TEXTS


@pytest.mark.parametrize("suffix", [".txt", ".md", ".py"])
def test_line_ends_stay_and_a_byte_order_mark_goes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"text{suffix}"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n\xef\xbb\xbfd")
    assert read(path) == ["a\r\nb\rc\n\ufeffd"]  # inside, U+FEFF is text


def test_a_byte_order_mark_before_the_first_line_goes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(["a"]))
    assert read(tmp_path / "a.jsonl") == ["a"]


def test_odd_texts_are_counted(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"a\xff\xfeb")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "half.jsonl").write_text(
        '{"text": "\\ud83d!"}\n\n  \n{"text": ""}\n{"text": null}\n'
    )  # half a surrogate pair
    (tmp_path / "latin.txt").write_bytes("Größe \ufffd".encode() + "naïve Käse".encode("latin-1"))
    stats = ReadStats()
    texts = read(tmp_path, stats=stats)
    assert texts == ["a\ufffd\ufffdb", "\ufffd!", "Größe \ufffdna\ufffdve K\ufffdse"]
    replaced = {"bad.txt": 2, "half.jsonl": 1, "latin.txt": 2}  # one of latin.txt's was there before
    assert stats == ReadStats(documents=3, empty=4, replaced=Counter(replaced))
    assert notes(stats.facts(), 5, {}) == [
        "data.paths: left out: 4 documents without text",
        "data.paths: not UTF-8: U+FFFD stands for 5 characters: 2 in bad.txt, 2 in latin.txt, 1 in half.jsonl",
    ]


@pytest.mark.parametrize("name", ["a.TXT", "b.Md", "c.txt.gz", "d.py.ZST"])
def test_text_is_read_whatever_the_case_and_the_compression(tmp_path: Path, name: str) -> None:
    pack = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}.get(name.lower().split(".")[-1], bytes)
    (tmp_path / name).write_bytes(pack(b"\xef\xbb\xbfa\r\nb"))
    assert read(tmp_path) == read(tmp_path / name) == ["a\r\nb"]


def test_what_is_not_read_is_counted_by_suffix(tmp_path: Path) -> None:
    for name in ("a.txt", "d/B.JSONL", "t.csv", "u.CSV", "v.json.gz", "Makefile", ".git/x.txt", ".hidden.txt", "e.rst"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}" if name == "d/B.JSONL" else "text")
    os.mkfifo(tmp_path / "pipe.txt")  # reading it would wait for ever
    left_out: Counter[str] = Counter()
    assert [source.name for source in find_sources([str(tmp_path)], left_out)] == ["a.txt", "d/B.JSONL"]
    kinds = {".csv": 2, ".json.gz": 1, "without a suffix": 1, ".rst": 1, "of no regular kind": 1}
    assert left_out == {**kinds, "hidden": 2}
    assert notes(ReadStats().facts(), 2, left_out) == [
        "data.paths: read 2 of 8 files; not read: 2 .csv, 1 .json.gz, 1 .rst, 1 of no regular kind, 1 without a suffix"
        "; 2 hidden files or folders left out"
    ]


def test_links_to_folders_are_followed_each_folder_once(tmp_path: Path) -> None:
    corpus, other = tmp_path / "corpus", tmp_path / "other"
    (corpus / "a").mkdir(parents=True)
    (other / "deep").mkdir(parents=True)
    (corpus / "a/x.txt").write_text("x")
    (other / "deep/y.txt").write_text("y")
    (corpus / "linked").symlink_to(other)
    (corpus / "again").symlink_to(corpus / "a")
    (other / "deep/loop").symlink_to(corpus)
    assert [source.name for source in find_sources([str(corpus)])] == ["a/x.txt", "linked/deep/y.txt"]


@pytest.mark.parametrize(
    "data", ["data/train-00000.parquet", "c4.json.gz", "rows.csv", "x.JSON", "data.zst", "a.tar.gz"]
)
def test_a_data_set_that_cannot_be_read_is_no_corpus_of_its_card(tmp_path: Path, data: str) -> None:
    for name in ("README.md", "LICENSE-APACHE.txt", f"{tmp_path.name}.py", data):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    with pytest.raises(ConfigError, match="holds data of kinds that aren't read .* the only text in it is .*README.md"):
        find_sources([str(tmp_path)])
    assert read(tmp_path / "README.md") == ["text"]  # named itself, it is meant
    (tmp_path / "chapter.txt").write_text("text")
    assert len(find_sources([str(tmp_path)])) == 4
    (tmp_path / data).unlink()
    (tmp_path / "chapter.txt").unlink()
    assert len(find_sources([str(tmp_path)])) == 3  # without data the READMEs are the corpus


def test_all_bad_lines_of_a_file_are_reported_at_once_and_skipped_on_demand(tmp_path: Path) -> None:
    lines = ['{"text": "a"}', "{", '{"text": 5}', '{"body": 1}', '{"text": "b"}', '{"text": 5}', '{"text": null}']
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError) as error:
        read(path)
    reported = str(error.value)
    assert (
        reported.startswith(f"data.paths: {path}, line 2: not JSON: ") and "; lines 3, 6: text=5: must be" in reported
    )
    assert "; line 4: no text under data.text_key=text" in reported and reported.endswith(
        "skip_bad_lines=true leaves bad lines out"
    )
    stats = ReadStats()
    assert list(read_documents(find_sources([str(path)]), "text", stats, skip_bad_lines=True)) == ["a", "b"]
    assert stats == ReadStats(documents=2, empty=1, skipped=Counter({"x.jsonl": 4}))
    assert "data.paths: left out (data.skip_bad_lines): 4 bad lines: 4 in x.jsonl" in notes(stats.facts(), 1, {})
    path.write_text('{"text": 5}\n' * 1000)
    with pytest.raises(ConfigError, match="lines 1, 2, .*, 10: text=5: .* [(]the rest of the file was not read[)];"):
        read(path)


def test_folders_are_read_recursively_by_path(tmp_path: Path) -> None:
    for name in ("b/z.txt", "b/a.md", "a.py", "c.rst", ".git/x.txt", "b/.hidden.txt", "B.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["B.txt", "a.py", "b/a.md", "b/z.txt"]
    assert [source.name for source in find_sources([str(tmp_path)])] == ["B.txt", "a.py", "b/a.md", "b/z.txt"]
    assert read(tmp_path / "a.py", tmp_path / "B.txt") == ["a.py", "B.txt"]  # what was named keeps its order


def test_an_origin_is_a_given_path_or_the_first_folder_of_a_single_one(tmp_path: Path) -> None:
    for name, size in (("web/en/a.txt", 10), ("web/b.txt", 10), ("code/c.py", 30), ("d.md", 5), ("e.md", 6)):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("x" * size)
    one = find_sources([str(tmp_path)])
    assert [source.origin for source in one] == ["code", "(top level)", "(top level)", "web", "web"]
    many = find_sources([str(tmp_path / "web"), str(tmp_path / "d.md")])
    assert [source.origin for source in many] == ["web", "web", "d.md"]
    assert list(main_origins(one)) == ["code", "web", "(top level)"]  # by size
    assert main_origins(one, 2) == {"code": "code", "web": "others", "(top level)": "others"}
    assert {"json", "asyncio", "(top level)"} <= {source.origin for source in find_sources([])}


def test_an_installed_package_is_a_corpus_too() -> None:
    one = find_sources(["package:json"])
    assert [source.name for source in one] == ["__init__.py", "decoder.py", "encoder.py", "scanner.py", "tool.py"]
    two = find_sources(["package:email", "package:json"])
    assert [source.origin for source in two][:: len(two) - 1] == ["package:email", "package:json"]
    assert {source.origin for source in find_sources(["package:email"])} == {"(top level)", "mime"}
    for name in ("package:nope", "package:json.decoder", "package:", "package:ast"):
        with pytest.raises(ConfigError, match=f"^data.paths: {name} is not an installed package"):
            find_sources([name])


def test_the_default_is_the_standard_library_without_tests() -> None:
    names = [source.name for source in find_sources([])]
    assert {"json/__init__.py", "ast.py", "asyncio/events.py"} <= set(names)
    assert names == sorted(names)
    assert not {"test", "tests", "idle_test", "site-packages", "dist-packages"} & {
        part for name in names for part in name.split("/")[:-1]
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": ', "x.jsonl, line 2: not JSON"),
        (
            "x.jsonl",
            b'\n{"body": "a", "id": 1}',
            "x.jsonl, line 2: no text under data.text_key=text, nor a list of messages; the line has body, id",
        ),
        ("x.jsonl", b'{"text": 12}', "line 1: text=12: must be text, or a list of messages"),
        ("x.jsonl", b'{"text": {"a": false}}', 'line 1: text={"a": false}: must be text, or a list of messages'),
        (
            "x.jsonl",
            b'{"text": "a"}\n[1]',
            "line 2: no text under data.text_key=text, nor a list of messages; the line has",
        ),
        ("x.jsonl", b'\n[{"text": "a"},\n', "x.jsonl: is a JSON array, not JSON lines; jq -c '.[]' x.jsonl writes one"),
        ("x.jsonl", b'{\n"text": "a"\n}', "x.jsonl: is a JSON document over several lines, not JSON lines; jq -c ."),
        (
            "x.jsonl",
            b'{"text": "a"},\n{"text": "b"},',
            "x.jsonl, lines 1, 2: not JSON: Extra data at character 14, as a comma follows the object; data.skip_bad",
        ),
        (
            "x.jsonl",
            b'{"messages": [{"role": "user", "content": "a"}]}',
            "the line has messages; data.text_key=messages reads its conversation",
        ),
        ("x.jsonl", json.dumps({"text": json.dumps(TALK)}).encode(), "line 1: text: is a conversation as JSON text"),
        ("x.txt", json.dumps(TALK, indent=1).encode(), "x.txt: holds conversations as JSON"),
        ("x.md", json.dumps({"messages": TALK}).encode() + b"\n{}", "x.md: holds conversations as JSON"),
        ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "x.jsonl: is a pointer of Git LFS"),
        ("x.txt", b"version https://git-lfs.github.com/spec/v1\noid", "x.txt: is a pointer of Git LFS"),
        ("x.txt", b"text, then\0\0", "x.txt: is a binary file (it holds NUL bytes), must be text"),
        ("x.txt", "text".encode("utf-16"), "x.txt: is UTF-16, must be UTF-8"),
        ("x.jsonl", '{"text": "a"}'.encode("utf-16"), "x.jsonl: is UTF-16, must be UTF-8"),
        (
            "x.jsonl",
            gzip.compress(b'{"text": "a"}', mtime=0),
            "x.jsonl: is a binary file (it holds NUL bytes), must be text",
        ),
        ("x.txt.gz", b"plain", "x.txt.gz: Not a gzipped file"),
        ("x.jsonl.gz", gzip.compress(jsonl(NOISE))[:9999], "x.jsonl.gz: Compressed file ended"),
        ("x.jsonl.gz", b"plain", "x.jsonl.gz: Not a gzipped file"),
        ("x.jsonl.zst", zstandard.ZstdCompressor().compress(jsonl(NOISE))[:9999], "x.jsonl.zst: compressed file ended"),
        ("x.jsonl.zst", b"plain text", "x.jsonl.zst: "),
        ("x.csv", b"a,b", "x.csv is no text; read are .txt .md"),
        ("x/y.csv", b"a,b", "x is no text; read are .txt .md .py .jsonl, also as .gz or .zst (it holds 1 .csv)"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read(tmp_path / name.split("/")[0])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith("data.paths: ")


def test_a_missing_path_is_named() -> None:
    with pytest.raises(ConfigError, match="^data.paths: /nope/数据.txt does not exist$"):
        find_sources(["/nope/数据.txt"])


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_a_line_above_the_limit_is_left_out_and_reported_with_its_number(tmp_path: Path, packed: str) -> None:
    lines = [json.dumps({"text": text}) for text in ("a", "b" * 3_000_000, "c", "d" * 88, "e" * 90)]
    content = "\n".join(lines).encode()
    name = f"x.jsonl{packed}"
    if packed == ".zst":
        content = zstandard.compress(content)
    (tmp_path / name).write_bytes(gzip.compress(content) if packed == ".gz" else content)
    stats = ReadStats()
    assert list(read_documents([Source(name, tmp_path / name)], "text", stats, most_bytes=100)) == ["a", "c", "d" * 88]
    assert stats.too_long == Counter({f"{name}, line 2": 3_000_012, f"{name}, line 5": 102})
    assert notes(stats.facts(), 1, {}) == [
        f"data.paths: left out (data.max_document_bytes): 2 too long: {name}, line 2 (3.0 MB); {name}, line 5 (0.0 MB)"
    ]


def test_a_text_above_the_limit_is_left_out_and_reported(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a" * 101)
    (tmp_path / "y.txt").write_text("a" * 100)
    sources, stats = [Source(name, tmp_path / name) for name in ("x.txt", "y.txt")], ReadStats()
    assert list(read_documents(sources, "text", stats, most_bytes=100)) == ["a" * 100]
    assert stats.too_long == Counter({"x.txt": 101})


def test_parts_of_a_file_have_each_line_once(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"text": "é" * size}, ensure_ascii=False) for size in (1, 50, 3, 200, 2, 7)]
    path.write_text("\n".join(["", *lines, "", "bad", lines[0]]) + "\n", encoding="utf-8")
    size = path.stat().st_size
    for step in (1, 2, 7, 60, size):
        cuts = [*range(0, size, step), None]
        found: list[str] = []
        stats = ReadStats()
        for begin, end in zip(cuts, cuts[1:]):
            part = Source("x.jsonl", path, begin=begin or 0, end=end)
            found += map(str, read_documents([part], "text", stats, skip_bad_lines=True))
        assert found == ["é" * size for size in (1, 50, 3, 200, 2, 7, 1)] and stats.skipped["x.jsonl"] == 1
    begin = path.read_bytes().index(b"bad") - 5
    with pytest.raises(ConfigError, match="x.jsonl, line 9: not JSON"):
        list(read_documents([Source("x.jsonl", path, begin=begin)], "text"))


def test_lines_are_split_across_chunks() -> None:
    text = b"ab\n\ncde\nf"
    for size in range(1, 10):
        chunks = (text[start : start + size] for start in range(0, len(text), size))
        assert list(split_lines(chunks, 100)) == text.split(b"\n")


def test_the_locale_does_not_matter(tmp_path: Path) -> None:
    folder = tmp_path / "数据"
    folder.mkdir()
    (folder / "ü b.txt").write_text("— ü\n" * 200, encoding="utf-8")
    (folder / "c.txt").write_text("plain", encoding="utf-8")
    code = """
import json, sys
from dsv3_lightning.data.config import DataConfig
from dsv3_lightning.data.text.prepare import prepare
from dsv3_lightning.data.text.store import read_manifest, TokenFile
from dsv3_lightning.data.text.tokenizer import Tokenizer
settings = json.loads(sys.stdin.buffer.read().decode("utf-8"))
folder = prepare(DataConfig(**settings))
text = Tokenizer.from_file(folder).decode(TokenFile(folder, "train").tokens.tolist(), skip_special_tokens=True)
print(ascii([text[:3], sys.getfilesystemencoding(), read_manifest(folder)["inputs"]["files"][0][0]]))
"""
    settings = {
        "paths": [str(folder / "ü b.txt"), str(folder)], "sources": None, "cleaning": None,
        "text_key": "text", "skip_bad_lines": False,
        "cache_dir": str(tmp_path / "实验"),
        "tokenizer": None, "vocab_size": 300, "sequence_length": 8, "batch_size": 1, "validation_fraction": 0.0,
        "mask_document_ends": False, "end_token": None,
        "isolate_documents": False, "seed": 0, "num_workers": 0, "batch_ramp": None,
        "packing": "best_fit", "weights_schedule": None, "fim_rate": 0.0, "split_rate": 0.0, **DEFAULTS,
    }  # fmt: skip
    found = []
    for changes in ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONUTF8": "1"}):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **changes}
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, input=json.dumps(settings).encode(), capture_output=True, env=environment)
        assert result.returncode == 0, result.stderr.decode()
        found.append(eval(result.stdout))
    assert found == [["— ü", "ascii", "ü b.txt"], ["— ü", "utf-8", "ü b.txt"]]
    assert len(list((tmp_path / "实验").glob("*/manifest.json"))) == 1  # the second process found the first one's


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "plain \\u00e9 数据"}',
        '{"text": "x", "n": NaN, "big": 123456789012345678901234567890}',
        '{"text": "x", "text": "y"}',
        '{"text": "\\ud83d"}',
        '{"text": ""}',
        '{"text": " \\n[x"}',
        '{"text": null}',
        '{"text": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        '{"other": "x"}',
        '{"text": "[{\\"role\\": \\"user\\", \\"content\\": \\"a\\"}]"}',
        "[1]",
        '{"text": "x"} y',
        '"text"',
    ],
)
def test_lines_mean_the_same_with_and_without_orjson(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    pytest.importorskip("orjson")
    (tmp_path / "x.jsonl").write_text('{"text": "first"}\n' + line, encoding="utf-8")
    found = []
    for library in (corpus.orjson, None):
        monkeypatch.setattr(corpus, "orjson", library)
        stats = ReadStats()
        try:
            documents = list(read_documents(find_sources([str(tmp_path / "x.jsonl")]), "text", stats))
            found.append((documents, stats.facts()))
        except ConfigError as error:
            found.append((str(error), {}))
    assert found[0] == found[1]
