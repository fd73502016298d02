"""Fuzzing of `dsv3 import` with damaged folders: it must exit with 0, or with 2 and one line, and leave nothing behind.

    python benchmarks/import_mutations.py --count 300 --seed 0

Each mutation changes a small folder in one place: a value or key of its JSON files, or the bytes of any file. All are
imported by the command's `main` in this process. Failures are printed with their numbers; `--first N --count 1` repeats
one.
"""

import argparse
import contextlib
import copy
import io
import json
import random
import shutil
import signal
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dsv3_lightning.cli import main
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.hub.config import to_json
from dsv3_lightning.hub.export import write_weights
from dsv3_lightning.hub.tokens import token_ids, write_generation_config, write_json, write_tokenizer
from dsv3_lightning.model.config import ModelConfig, Yarn
from dsv3_lightning.model.transformer import Transformer, fill

SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "kv_lora_rank": 8,
    "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_nextn_predict_layers": 1,
    "max_position_embeddings": 256,
}  # fmt: skip
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2.0, 1.5, 10**9, 10**30, -(10**30), 1e308, float("nan"), float("inf"), "", "7", "yes",
    "../x", "\0", "ø" * 100, [], {}, [None], [[]], {"content": 3}, [1, 2], {"a": {"b": []}},
)  # fmt: skip
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
SECONDS = 30  # after which a mutation counts as hanging


def make_folder(folder: Path) -> None:
    """Writes a small model with MTP and YaRN in several files, with its tokenizer."""
    tokenizer = Tokenizer.train(["some plain words, 12 34"] * 3, 290)
    yarn = Yarn(factor=4, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=1.0)
    config = ModelConfig(vocab_size=tokenizer.vocab_size + 30, rope_scaling=yarn, **SHAPE)
    folder.mkdir(parents=True)
    model = Transformer(config)
    model.init_weights(0, fill)
    state = model.state_dict()
    read = lambda name, expert: state[name] if expert is None else state[name][expert]  # noqa: E731
    write_weights(config, read, folder, torch.float32, 60_000)
    write_json(folder / "config.json", to_json(config, token_ids(tokenizer), "float32"))
    write_tokenizer(tokenizer, folder, 256)
    write_generation_config(tokenizer, folder, tokenizer.ids_without_text(config.vocab_size))


def mutate(folder: Path, chance: random.Random) -> str:
    """Applies one mutation; returns its description."""
    if chance.random() < 0.75:
        return mutate_json(chance.choice(sorted(folder.glob("*.json"))), chance)
    return mutate_bytes(chance.choice(sorted(folder.iterdir())), chance)


def mutate_json(file: Path, chance: random.Random) -> str:
    """Replaces, removes, adds or wraps a value anywhere in the file, at the top level as often as deeper."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if chance.random() < 0.03:
        content, what = chance.choice(STRANGE), "everything"
    else:
        node, key = chance.choice(places(content, chance.choice((1, 1, 2, 6))))
        what = f"{key!r}: {str(node[key])[:40]!r}"
        kind = chance.randrange(10)
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[f"{key}_"] = node.pop(key)
        elif kind == 2:
            node[key] = chance.choice(([node[key]], {"x": node[key]}, str(node[key]), [node[key]] * 3))
        elif kind == 3 and type(node[key]) is int:
            node[key] = chance.choice((float(node[key]), node[key] + 1, node[key] * 2, node[key] - 1))
        else:
            node[key] = copy.deepcopy(chance.choice(STRANGE))
        what += (
            f" -> {str(node[key])[:40]!r}" if key in node or isinstance(node, list) and key < len(node) else " -> gone"
        )
    file.write_text(json.dumps(content), encoding="utf-8")
    return f"{file.name} {what}"


def places(node: Any, depth: int) -> list[tuple[Any, Any]]:
    """All pairs of container and key, down to a depth."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
    found = [(node, key) for key in keys]
    return found + [place for key in keys if depth > 1 for place in places(node[key], depth - 1)]


def mutate_bytes(file: Path, chance: random.Random) -> str:
    data = file.read_bytes()
    at = chance.randrange(min(len(data), chance.choice((16, 2000, len(data)))))
    kind = chance.choice(
        ("cut", "empty", "pointer", "gone", "folder", "flipped", "inserted", "UTF-16", "marked", "nested")
    )
    if kind in ("gone", "folder"):
        file.unlink()
        if kind == "folder":
            file.mkdir()
        return f"{file.name} {kind}"
    file.write_bytes(
        {
            "cut": data[:at],
            "empty": b"",
            "pointer": POINTER,
            "flipped": data[:at] + bytes([data[at] ^ chance.randrange(1, 256)]) + data[at + 1 :],
            "inserted": data[:at] + chance.randbytes(chance.randrange(1, 9)) + data[at:],
            "UTF-16": data.decode("latin-1").encode("utf-16"),
            "marked": b"\xef\xbb\xbf" + data,
            "nested": b"[" * 200_000,
        }[kind]
    )
    return f"{file.name} {kind} at {at}"


def judge(folder: Path) -> str | None:
    """Imports the folder; returns what was wrong with the outcome, or None."""
    before = sorted(folder.parent.iterdir())
    target = folder.parent / "written.yaml"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), alarm():
        try:
            code = main(["import", str(folder), "--out", str(target)])
        except BaseException:  # also panics of native libraries
            return traceback.format_exc(limit=-4)
    said = err.getvalue()
    if code == 0:
        if not target.is_file():
            return "exit 0, and nothing was written"
        target.unlink()
        return None if not said else f"exit 0, and on the standard error: {said}"
    line = said.count("\n") == 1 and said.startswith("dsv3: error: ") and str(folder) in said and len(said) < 1000
    if code != 2 or not line:
        return f"exit {code}: {said}"
    return None if sorted(folder.parent.iterdir()) == before else "something was left behind"


@contextlib.contextmanager
def alarm() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def run(count: int, seed: int, first: int, verbose: bool = False) -> list[str]:
    """Tests mutations; returns the failures."""
    faults = []
    with tempfile.TemporaryDirectory() as base:
        sound, folder = Path(base) / "sound", Path(base) / "work" / "hf"
        make_folder(sound)
        for number in range(first, first + count):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(sound, folder)
            what = mutate(folder, random.Random(f"{seed} {number}"))
            fault = judge(folder)
            if verbose or fault:
                print(f"{number}: {what}: {fault or 'fine'}", flush=True)
            if fault:
                faults.append(f"{number}: {what}: {fault}")
    return faults


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    found = run(arguments.count, arguments.seed, arguments.first, arguments.verbose)
    print(f"{len(found)} of {arguments.count} mutations end in another way than exit 0, or 2 with one line")
    raise SystemExit(bool(found))
