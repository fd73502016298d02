"""The package's rules: which folder may import which, one name per module, every package in the wheel's list."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dsv3_lightning"
# A file imports from its own folder or from lower layers, never from another folder of its own layer.
LAYERS = {
    "errors": 0, "common": 1, "model": 2, "data": 2, "parallel": 3, "hub": 3, "inference": 3, "planning": 3,
    "evaluation": 4, "training": 5, "callbacks": 6, "config": 7, "runs": 8, "api": 9, "studies": 9, "commands": 9,
    "cli": 10, "__main__": 11,
}  # fmt: skip
FORBIDDEN = {
    "common": ("torch", "lightning"),
    "model": ("lightning", "torch.distributed"),
    "planning": ("torch", "lightning", "numpy"),
}


def sources(folder: Path) -> list[Path]:
    hidden = {".venv", "build", "dist"}
    return [path for path in sorted(folder.rglob("*.py")) if not hidden & set(path.relative_to(folder).parts)]


def imports(path: Path) -> Iterator[str]:
    """Full names of everything a file imports, inside functions too: `a.b` and `a.b.c` for `from a.b import c`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (module, *(f"{module}.{alias.name}" for alias in node.names))


def folder_of(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def package_files() -> Iterator[tuple[str, Path]]:
    for path in sources(PACKAGE):
        yield folder_of(path.relative_to(PACKAGE).parts), path
    for path in sources(ROOT / "callbacks"):  # the symlink is not followed
        yield "callbacks", path


def test_imports_go_down():
    for folder, path in package_files():
        if folder == "__init__":
            continue
        for name in imports(path):
            assert not name.startswith("."), f"{path.relative_to(ROOT)}: imports are absolute in the package"
            first, *rest = name.split(".")
            if first == "dsv3_lightning" and rest and rest[0] in LAYERS and rest[0] != folder:
                assert LAYERS[rest[0]] < LAYERS[folder], f"{path.relative_to(ROOT)} imports {name}"
            for banned in FORBIDDEN.get(folder, ()):
                assert not f"{name}.".startswith(f"{banned}."), f"{path.relative_to(ROOT)} imports {name}"


def test_benchmarks_run_as_scripts():
    for path in sources(ROOT / "benchmarks"):
        names = {name.split(".")[0] for name in imports(path)}
        assert not names & {"tests", "benchmarks"}, f"{path.name}: python benchmarks/{path.name} finds no such module"


def test_every_folder_has_a_layer():
    assert {folder for folder, _ in package_files()} - {"__init__"} <= set(LAYERS)


def test_nothing_imports_callbacks_by_its_top_level_name():
    """It would work from the repository's root, and give every class a second time."""
    for path in sources(ROOT):
        assert not [name for name in imports(path) if name.split(".")[0] in ("callbacks", "configs")], path
    for path in (ROOT / "configs").glob("*.yaml"):
        assert not re.search(r"class_path:\s*callbacks\.", path.read_text(encoding="utf-8")), path


def test_every_package_on_disk_is_in_the_wheels_list():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")  # read as text: tomllib came with Python 3.11
    listed = set(re.findall(r'^    "(dsv3_lightning[\w.]*)",$', project, re.MULTILINE))
    on_disk = {".".join(path.parent.relative_to(ROOT).parts) for path in sources(PACKAGE)}
    assert listed == on_disk | {"dsv3_lightning.callbacks", "dsv3_lightning.configs"}


def test_symlinks_lead_to_the_real_folders():
    for name in ("callbacks", "configs"):
        assert (PACKAGE / name).resolve() == ROOT / name
