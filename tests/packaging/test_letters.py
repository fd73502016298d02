"""One letter, one meaning: the suffixes of tensors' names, and the shapes in docstrings, use the legend's letters."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import dsv3_lightning.model
from tests.packaging.test_layout import PACKAGE, ROOT, sources

LEGEND = dict(re.findall(r"^([A-Z]) (.+)$", dsv3_lightning.model.__doc__ or "", re.MULTILINE))
SUFFIX = re.compile(r"[a-z]\w*?_([A-Z1]*[A-Z][A-Z1]*)")
SHAPE = re.compile(r"\[([^\[\]]*)\]")
FILES = [path for folder in (PACKAGE, ROOT / "callbacks", ROOT / "benchmarks") for path in sources(folder)]


def names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            yield node.arg


def shapes(tree: ast.AST) -> Iterator[str]:
    """The single letters of every [...] in a docstring, as in [B, T, D] and [1 + mtp_depth]."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            for shape in SHAPE.findall(ast.get_docstring(node) or ""):
                yield from re.findall(r"(?<![\w.])[A-Z](?!\w)", shape)


def test_the_legend_says_what_the_letters_mean():
    assert {"B", "T", "D", "H", "E", "K", "V", "L", "P", "S", "R"} <= set(LEGEND)
    assert "experts per token" in LEGEND["K"] and "hidden size" in LEGEND["D"]
    assert len(set(LEGEND.values())) == len(LEGEND)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_and_docstrings_use_no_letter_beside_the_legends(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    suffixes = {name: match[1] for name in names(tree) if (match := SUFFIX.fullmatch(name))}
    assert {name: suffix for name, suffix in suffixes.items() if set(suffix) - {*LEGEND, "1"}} == {}
    assert set(shapes(tree)) - set(LEGEND) == set()
