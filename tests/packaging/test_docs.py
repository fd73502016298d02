"""What the documents name exists: links, tests, benchmarks, files of the recipes; the site builds without a warning."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace as Namespace

import pytest

from dsv3_lightning.callbacks.settings import CLASSES
from dsv3_lightning.cli import main

from .test_layout import LAYERS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
NAMED = re.compile(r"`((?:dsv3_lightning|callbacks|configs|tests|benchmarks|docs|examples)/[\w./-]+)`")
RUN = re.compile(r"(?:pytest|python)((?: (?:tests|benchmarks|examples)/[\w./-]+)+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    links = [page.parent / link for link in LINK.findall(text) if "://" not in link]
    named = [ROOT / name for name in NAMED.findall(text) if "NAME" not in name]
    run = [ROOT / name for words in RUN.findall(text) for name in words.split()]
    assert [str(path.relative_to(ROOT)) for path in (*links, *named, *run) if not path.exists()] == []


@pytest.mark.slow
def test_the_pages_tests_are_found_by_pytest_as_they_call_it():
    """By the script in the environment, which unlike `python -m pytest` doesn't put the working folder on the path."""
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = sorted({name for words in re.findall(r"pytest((?: tests/[\w./]+)+)", pages) for name in words.split()})
    command = [Path(sys.executable).with_name("pytest"), "--collect-only", "-qq", *named]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert len(named) > 30 and done.returncode == 0, done.stdout[-2000:]


def test_each_page_is_listed_once_everywhere():
    """In the site's navigation, on its first page and in the README."""
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    for source in ("mkdocs.yml", "docs/index.md", "README.md"):
        text = (ROOT / source).read_text(encoding="utf-8")
        listed = re.findall(r"^(?:\| \[[^\]]+\]\((?:docs/)?|      - [^:]+: )(\w+\.md)", text, re.MULTILINE)
        assert sorted(name for name in listed if name != "CONTRIBUTING.md") == sorted(pages), source


def test_the_architecture_page_has_the_layers_that_the_import_test_enforces():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", text, re.MULTILINE)
    shown = {name: int(layer) for layer, cell in rows for name in re.findall(r"`(\w+)(?:/|\.py)`", cell)}
    assert shown == {name: layer for name, layer in LAYERS.items() if name != "__main__"}


def test_each_recipe_touches_at_most_five_files():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    recipes = text[text.index("## Recipes") :].split("\n### ")[1:]
    assert [recipe.split("\n")[0] for recipe in recipes] == [
        "A balance loss",
        "A callback",
        "A setting",
        "A preset",
        "A strategy",
        "A verb",
    ]
    for recipe in recipes:
        steps = re.findall(r"^\d\. `([^`]+)`", recipe, re.MULTILINE)
        assert 1 <= len(steps) <= 5, recipe


def test_the_readmes_trainings_are_valid(capsys: pytest.CaptureFixture[str]):
    """Each `lightning run` line, as `dsv3 validate` sees it; one is there to be refused."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    commands = {
        line.removeprefix("$ "): after
        for line, after in zip(lines, lines[1:])
        if re.match(r"(\$ )?lightning run [a-z]", line)
    }
    assert len(commands) >= 4
    for command, after in commands.items():
        refused = after.startswith("dsv3: error: ")
        assert main(["validate", *command.split()[2:]]) == (2 if refused else 0), command
        assert not refused or capsys.readouterr().err.strip() == after


def test_every_callback_is_on_the_page_about_them():
    """A hook adds those of the table; editors find what the package imports for them."""
    page = Namespace(file=Namespace(src_uri="api/callbacks.md"))
    shown = runpy.run_path(str(ROOT / "docs/callbacks_page.py"))["on_page_markdown"]("", page)
    assert [
        name for name, kind in CLASSES.items() if f"::: dsv3_lightning.callbacks.{name}.{kind}\n" not in shown
    ] == []
    imported = (ROOT / "callbacks/__init__.py").read_text(encoding="utf-8")
    assert [
        kind for name, kind in CLASSES.items() if f"callbacks.{name} import {kind} as {kind}\n" not in imported
    ] == []


def test_the_example_of_a_new_model_runs_as_it_is_printed():
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n([^`]*build_model\(.*?)^```", page, re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["losses"].counts_LE.sum(1).tolist() == [2 * 64 * 4] * 3  # MoE layers, each token to 4 experts


def plan_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["plan", str(ROOT / words[0]), *words[1:]]) == 0
    return capsys.readouterr().out


def test_the_plan_that_is_printed_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]):
    page = (ROOT / "docs/parallelism.md").read_text(encoding="utf-8")
    (command, printed) = re.findall(r"^\$ dsv3 plan (.+)\n\.\.\.\n(.+?)^```", page, re.MULTILINE | re.DOTALL)[0]
    assert plan_of(command.split(), capsys).endswith(printed)


def test_planned_memory_of_the_cluster_files_is_the_plans(capsys: pytest.CaptureFixture[str]):
    page = (ROOT / "docs/parallelism.md").read_text(encoding="utf-8")
    rows = re.findall(r"\((?:\.\./)(configs/cluster/\S+\.yaml)\) \| ([\d,]+)[^|]*\| ([\d.]+ GB) and", page)
    assert len(rows) == len(list((ROOT / "configs/cluster").glob("*.yaml")))
    for file, gpus, memory in rows:
        shown = plan_of([file, "--gpus", gpus.replace(",", ""), "--gpu", "h800"], capsys)
        assert re.findall(r"^sum +([\d.]+ GB)", shown, re.MULTILINE) == [memory], file


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ExpertBias" in (tmp_path / "api/callbacks/index.html").read_text(encoding="utf-8")
