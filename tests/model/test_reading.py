"""The model can be read in one sitting: its files stay short, and machinery lies in files of its own."""

import ast
import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

import dsv3_lightning.model

from .small import small_batch, small_config, small_model

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


def test_tensors_have_the_sizes_that_the_letters_of_their_names_mean():
    """Every local variable of every function of the model, in a step in which all sizes are different."""
    config = small_config(
        n_routed_experts=20, num_experts_per_tok=9, n_group=5, topk_group=3, num_nextn_predict_layers=2,
        num_attention_heads=6, hidden_size=40,
    )  # fmt: skip
    sizes = {"B": 2, "T": 7, "S": 10, "N": 14, "P": 3, "D": 40, "H": 6, "V": 61, "L": 4, "E": 20, "K": 9, "G": 5,
             "R": 126, "F": 16, "1": 1}  # fmt: skip
    assert len(set(sizes.values())) == len(sizes)
    model = small_model(config, balance=("sequence", "device", "batch"))
    batch = small_batch(config, B=2, T=7)
    checked: dict[str, int] = {}
    wrong: list[str] = []

    def look(frame: FrameType, event: str, result: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event != "return" or path.parent != FOLDER:
            return
        for name, value in frame.f_locals.items():
            match = re.fullmatch(r"[a-z]\w*?_([A-Z1]+)", name)
            if match is None or not isinstance(value, Tensor):
                continue
            shape = tuple(sizes.get(letter, -1) for letter in match[1])  # -1: C, of which values have their own
            fits = len(shape) == value.dim() and all(b in (-1, a) for a, b in zip(value.shape, shape))
            checked[path.stem] = checked.get(path.stem, 0) + 1
            if not fits:
                wrong.append(f"{path.stem}.{frame.f_code.co_name}: {name} {tuple(value.shape)}")

    sys.setprofile(look)
    try:
        losses = model.losses(*batch, draft=True)
    finally:
        sys.setprofile(None)
    assert losses.nll_P.shape == (3,)
    assert not wrong, "\n".join(sorted(set(wrong)))
    assert {"attention", "router", "experts", "moe", "mtp", "transformer", "balance", "permute", "block"} <= set(
        checked
    )
