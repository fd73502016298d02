"""The model can be read in one sitting: its files stay short, and machinery lies in files of its own."""

import ast
from pathlib import Path

import dsv3_lightning.model

FOLDER = Path(dsv3_lightning.model.__file__).parent
READ = "config rope norm attention router experts moe block mtp transformer losses balance".split()
LINES = 900


def test_what_the_report_describes_takes_at_most_900_lines():
    counts = {name: len((FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in READ}
    assert sum(counts.values()) <= LINES, counts


def test_the_package_names_every_file_as_one_to_read_or_as_machinery():
    text = dsv3_lightning.model.__doc__
    machinery = {path.stem for path in FOLDER.glob("*.py")} - {*READ, "__init__"}
    assert not [name for name in (*READ, *machinery) if name not in text]


def test_no_forward_pass_asks_what_it_has():
    """Blocks, feed-forward networks, attention and MTP kinds are chosen when the model is built."""
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name in ("forward", "losses", "trunk", "queries"):
                called = {
                    call.func.id
                    for call in ast.walk(node)
                    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
                }
                assert not called & {"hasattr", "isinstance", "getattr"}, (path.name, node.name)
