"""Kinds of files of named sources: each gives the same texts, and each fault is one line with the file's name."""

import gzip
import io
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from dsv3_lightning.data.cleaning.config import CleaningConfig
from dsv3_lightning.data.config import DataConfig, SourceConfig
from dsv3_lightning.data.text.corpus import read_documents
from dsv3_lightning.data.text.prepare import prepare
from dsv3_lightning.data.text.sources import sources_of
from dsv3_lightning.data.text.tally import ReadStats, notes
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError

MakeConfig = Callable[..., DataConfig]
CLEANING = CleaningConfig(
    repair=False, languages=None, quality={}, pii=True, exact=True, near=None, scope="global", decontaminate=None
)
TEXT = "The committee met in the old hall.\n数据处理的管道。"
PAGE = f"<html><head><meta charset=utf-8><title>t</title></head><body><p>{TEXT}</p><script>x()</script></body></html>"


@pytest.fixture
def read(tmp_path: Path, make_config: MakeConfig) -> Callable[..., list[Any]]:
    def documents(*paths: str, stats: ReadStats | None = None, most_bytes: int = 1 << 30, **changes: Any) -> list[Any]:
        source = SourceConfig(paths=[str(path) for path in paths], **changes)
        config = make_config(tmp_path, paths=[], sources={"s": source})
        return list(read_documents(sources_of(config), "text", stats, most_bytes=most_bytes))

    return documents


def words(found: list[Any]) -> list[list[str]]:
    return [text.split() for text in found]


def warc(*records: tuple[str, bytes]) -> bytes:
    parts = []
    for number, (kind, content) in enumerate(records):
        media = "application/http; msgtype=response" if kind == "response" else "text/plain"
        fields = {"WARC-Type": kind, "WARC-Record-ID": f"<urn:uuid:{number:032}>", "Content-Type": media}
        head = "".join(f"{name}: {value}\r\n" for name, value in {**fields, "Content-Length": len(content)}.items())
        parts.append(gzip.compress(f"WARC/1.0\r\n{head}\r\n".encode() + content + b"\r\n\r\n"))
    return b"".join(parts)


def response(kind: str, body: str) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Type: {kind}; charset=utf-8\r\n\r\n{body}".encode()


def write_parquet(path: Path, **columns: list[Any]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path)


def test_the_text_of_a_page_is_read(tmp_path: Path, read: Any) -> None:
    pytest.importorskip("resiliparse")
    (tmp_path / "a.html").write_text(PAGE, encoding="utf-8")
    (tmp_path / "b.htm.gz").write_bytes(gzip.compress(PAGE.replace("utf-8", "gb18030").encode("gb18030")))
    assert words(read(tmp_path / "*.htm*")) == [TEXT.split()] * 2


def test_pages_and_texts_of_archives_are_read(tmp_path: Path, read: Any) -> None:
    pytest.importorskip("resiliparse"), pytest.importorskip("fastwarc")
    records = [
        ("warcinfo", b"x"),
        ("response", response("text/html", PAGE)),
        ("response", response("image/png", "no text")),
        ("conversion", TEXT.encode()),
    ]
    (tmp_path / "a.warc.gz").write_bytes(warc(*records))
    assert words(read(tmp_path)) == [TEXT.split()] * 2


def test_rows_of_parquet_are_read(tmp_path: Path, read: Any) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write_parquet(tmp_path / "a.parquet", text=[TEXT, None, "x"])
    write_parquet(tmp_path / "b.parquet", messages=[chat])
    assert read(tmp_path / "a.parquet") == [TEXT, "x"]
    ((first, second),) = read(tmp_path / "b.parquet", text_key="messages")
    assert (first.role, first.text, second.text, second.learned) == ("user", "a", "b", True)


@pytest.fixture
def token_files(tmp_path: Path) -> Path:
    """Two documents, of two sequences and of one, in Megatron's layout."""
    tokenizer = Tokenizer.train([TEXT], 300)
    tokenizer.save(tmp_path)
    ids = [tokenizer.encode_batch([text])[0] for text in ("The committee", " met", TEXT)]
    arrays = [np.array(list(one), "<u2") for one in ids]
    (tmp_path / "t.bin").write_bytes(b"".join(array.tobytes() for array in arrays))
    lengths = np.array([len(array) for array in arrays], "<i4")
    starts = np.concatenate([[0], np.cumsum(lengths[:-1]) * 2]).astype("<i8")
    bounds = np.array([0, 2, 3], "<i8")
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 3)
    (tmp_path / "t.idx").write_bytes(header + lengths.tobytes() + starts.tobytes() + bounds.tobytes())
    return tmp_path / "t.idx"


def test_token_files_of_megatron_are_read_as_text(token_files: Path, read: Any) -> None:
    tokenizer = str(token_files.with_name("tokenizer.json"))
    assert read(token_files, tokenizer=tokenizer) == ["The committee met", TEXT]
    with pytest.raises(ConfigError, match=r"data.sources.s.paths: .*t.idx: token files need the tokenizer"):
        read(token_files)
    bin_file = token_files.with_suffix(".bin")
    bin_file.write_bytes(bin_file.read_bytes()[:-2])
    with pytest.raises(ConfigError, match=r"t.idx: t.bin is missing or shorter"):
        read(token_files, tokenizer=tokenizer)
    token_files.write_bytes(token_files.read_bytes()[:-8])
    with pytest.raises(ConfigError, match=r"t.idx: has \d+ bytes in place of \d+"):
        read(token_files, tokenizer=tokenizer)


def test_other_tokens_behind_the_same_index_are_prepared_again(
    token_files: Path, tmp_path: Path, make_config: MakeConfig
) -> None:
    tokenizer = str(token_files.with_name("tokenizer.json"))
    sources = {"s": SourceConfig(paths=[str(token_files)], tokenizer=tokenizer)}
    config = make_config(tmp_path, paths=[], sources=sources, tokenizer=tokenizer, validation_fraction=0.0)
    before = prepare(config)
    data = token_files.with_suffix(".bin")
    data.write_bytes(data.read_bytes()[2:] + data.read_bytes()[:2])
    assert prepare(config) != before


def test_a_source_tree_is_read_by_the_endings_of_code(tmp_path: Path, read: Any) -> None:
    for name in ("a.go", "b/c.rs", "b/d.txt", "e.png", "f.py"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(name, encoding="utf-8")
    assert read(tmp_path / "tree", kind="code") == ["a.go", "b/c.rs", "f.py"]
    assert read(tmp_path / "tree") == ["b/d.txt", "f.py"]
    assert read(tmp_path / "tree" / "e.png", kind="text") == ["e.png"]


def test_patterns_and_urls_name_files(tmp_path: Path, read: Any) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    for name in ("a.txt", "b.txt", "c.png"):
        store.pipe(f"/{tmp_path.name}/{name}", name.encode())
        (tmp_path / name).write_text(name, encoding="utf-8")
    url = f"memory://{tmp_path.name}"
    assert read(tmp_path / "*.txt") == read(url) == read(f"{url}/*.txt") == ["a.txt", "b.txt"]
    assert read(f"{url}/b.txt") == ["b.txt"]
    store.pipe(f"/{tmp_path.name}/b.txt", b"changed")
    assert read(f"{url}/b.txt") == ["changed"]
    with pytest.raises(ConfigError, match=rf"data.sources.s.paths: {url}/nope.txt has no file that is read"):
        read(f"{url}/nope.txt")
    with pytest.raises(ConfigError, match=r"data.sources.s.paths: nope://x: .*nope"):
        read("nope://x")
    with pytest.raises(ConfigError, match=r"data.sources.s.paths: .*\*.nope matches no file"):
        read(tmp_path / "*.nope")


@pytest.mark.parametrize("where", [30, -6])
def test_a_broken_member_of_an_archive_is_reported(tmp_path: Path, read: Any, where: int) -> None:
    pytest.importorskip("fastwarc"), pytest.importorskip("resiliparse")
    content = bytearray(warc(("conversion", TEXT.encode()), ("conversion", TEXT.encode() * 50)))
    content[where] ^= 0xFF
    (tmp_path / "a.warc.gz").write_bytes(content)
    with pytest.raises(ConfigError, match=r"data.sources.s.paths: .*a.warc.gz: "):
        read(tmp_path)
    (tmp_path / "a.warc.gz").write_bytes(warc(("conversion", TEXT.encode()))[:-10])
    with pytest.raises(ConfigError, match=r"data.sources.s.paths: .*a.warc.gz: "):
        read(tmp_path)


def test_a_table_with_other_columns_is_reported(tmp_path: Path, read: Any) -> None:
    write_parquet(tmp_path / "a.parquet", content=["x"], number=[1])
    with pytest.raises(
        ConfigError, match=r"s.paths: .*a.parquet: no column text; it has content, number; set text_key"
    ):
        read(tmp_path)
    with pytest.raises(ConfigError, match=r"a.parquet: column number holds int64; must be text"):
        read(tmp_path, text_key="number")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(ConfigError, match=r"s.paths: .*a.parquet: "):
        read(tmp_path)


def parquet_of(*texts: bytes) -> bytes:
    """A file of texts, whose bytes need not be UTF-8."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    ends = np.cumsum([0, *map(len, texts)]).astype("<i4").tobytes()
    column = pyarrow.StringArray.from_buffers(len(texts), pyarrow.py_buffer(ends), pyarrow.py_buffer(b"".join(texts)))
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": column}), file)
    return file.getvalue()


FILES: dict[str, Callable[..., bytes]] = {  # each of two texts
    "a.jsonl": lambda *texts: b"".join(b'{"text": "' + text + b'"}\n' for text in texts),
    "a.jsonl.gz": lambda *texts: gzip.compress(FILES["a.jsonl"](*texts)),
    "a.jsonl.zst": lambda *texts: zstandard.compress(FILES["a.jsonl"](*texts)),
    "a.parquet": parquet_of,
    "a.wet": lambda *texts: gzip.decompress(FILES["a.wet.gz"](*texts)),
    "a.wet.gz": lambda *texts: warc(*(("conversion", text) for text in texts)),
}


def skip_without_packages(name: str) -> None:
    for package in {"a.parquet": ["pyarrow"], "a.wet": ["fastwarc", "resiliparse"]}.get(name.removesuffix(".gz"), []):
        pytest.importorskip(package)


@pytest.mark.parametrize("name", FILES)
def test_invalid_utf_8_is_replaced_and_counted_by_source_and_file(tmp_path: Path, read: Any, name: str) -> None:
    skip_without_packages(name)
    (tmp_path / name).write_bytes(FILES[name](b"a\xffb", b"fine"))
    stats = ReadStats()
    assert read(tmp_path, stats=stats) == ["a\ufffdb", "fine"]
    (note,) = notes(stats.facts(), 1, {}, "data.sources")
    assert note == f"data.sources: not UTF-8: U+FFFD stands for 1 characters: 1 in s/{name}"


@pytest.mark.parametrize("name", [*FILES, "a.html"])
def test_a_text_above_the_limit_is_left_out_and_reported(tmp_path: Path, read: Any, name: str) -> None:
    skip_without_packages(name if name in FILES else "a.wet")
    long = b"long " * 200
    content = FILES[name](long, b"fine") if name in FILES else b"<html><body><p>" + long + b"</p></body></html>"
    (tmp_path / name).write_bytes(content)
    stats = ReadStats()
    assert read(tmp_path, stats=stats, most_bytes=500) == ["fine"] * (name in FILES)
    (where,) = stats.too_long
    assert where.startswith(f"s/{name}") and stats.too_long[where] >= len(long)


@pytest.mark.parametrize("name", [*FILES, "a.txt", "a.html"])
def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path, make_config: MakeConfig, name: str) -> None:
    skip_without_packages(name)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / name).symlink_to(name)  # a loop, which nobody may open, not even root
    sources = {"s": SourceConfig(paths=[str(tmp_path / "texts")])}
    for cleaning in (None, CLEANING):
        config = make_config(tmp_path, paths=[], sources=sources, cleaning=cleaning)
        with pytest.raises(ConfigError, match=rf"^data\.sources\.s\.paths: .*/{name}: .*symbolic links$"):
            prepare(config)
    with pytest.raises(ConfigError, match=rf"^data\.sources\.s\.paths: .*/{name}: "):  # it could be opened before
        list(read_documents(sources_of(config), "text"))
    assert not list((tmp_path / "cache").glob("*/*/done.json"))


@pytest.mark.parametrize("name", [name for name in FILES if name != "a.jsonl"])
def test_a_file_that_is_cut_off_is_named(tmp_path: Path, read: Any, name: str) -> None:
    skip_without_packages(name)
    (tmp_path / name).write_bytes(FILES[name](b"fine", random.Random(0).randbytes(4000).hex().encode())[:-1500])
    with pytest.raises(ConfigError, match=rf"^data\.sources\.s\.paths: .*/{name}: "):
        read(tmp_path)


def test_kinds_that_are_not_read_are_named(tmp_path: Path, read: Any) -> None:
    (tmp_path / "a.csv").write_text("x", encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"data.sources.s.paths: .* is no text; read are .*\.parquet.* \(it holds 1 .csv\)"
    ):
        read(tmp_path)
