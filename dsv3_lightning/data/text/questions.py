"""Sample conversations for instruction tuning without a download, about functions of Python's standard library.

    python -m dsv3_lightning.data.text.questions runs/questions.jsonl

Each line is {"messages": [...]}: what a public function or class does (the first sentence of its docstring) and how it
is called. The sources are read, not imported. Every tenth line also has a system message.
"""

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from dsv3_lightning.common.files import write_file
from dsv3_lightning.common.paths import display_path, user_path
from dsv3_lightning.data.text.sources import find_sources

LONGEST = 160  # characters of an answer
SYSTEM = "You know the Python standard library."


def conversations() -> Iterator[list[dict[str, str]]]:
    for source in find_sources([]):
        module = source.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if any(part.startswith("_") for part in module.split(".")):
            continue
        try:
            tree = ast.parse(source.path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # templates, and files of other encodings
            continue
        for name, node in documented(tree.body, module):
            does = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            called = f"{name}({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else f"{name} is a class."
            if does and max(len(does), len(called)) <= LONGEST:
                yield [
                    {"role": "user", "content": f"What does {name} do?"},
                    {"role": "assistant", "content": does},
                    {"role": "user", "content": "How is it called?"},
                    {"role": "assistant", "content": called},
                ]


def documented(body: list[ast.stmt], path: str) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Yields public functions, methods and classes with their full names."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            name = f"{path}.{node.name}"
            yield name, node
            if isinstance(node, ast.ClassDef):
                yield from documented(node.body, name)


def write(path: Path) -> int:
    """Writes one conversation per line; returns their number."""
    lines = []
    for number, messages in enumerate(conversations()):
        system = [{"role": "system", "content": SYSTEM}] if number % 10 == 0 else []
        lines.append(json.dumps({"messages": [*system, *messages]}, ensure_ascii=False) + "\n")
    write_file(path, "".join(lines).encode("utf-8", "replace"))
    return len(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m dsv3_lightning.data.text.questions FILE.jsonl")
    target = user_path(sys.argv[1])
    print(f"{display_path(target)}: {write(target)} conversations")
