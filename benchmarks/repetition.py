"""DPO against repetition: a small model's own loops as rejected answers, the text's continuation as chosen ones.

python benchmarks/repetition.py --seeds 1 2 3 --dir runs/reproduce/repetition
A model of nano's shape is pre-trained on paragraphs of the standard library's docstrings. `dsv3 sample --pairs` lets it
continue paragraphs that it was trained on; an answer with more than 30 % repeated pairs of tokens becomes the rejected
one. Before and after DPO the greedy continuations of 300 held-out paragraphs are counted by the protocol `repetition`
(DeepSeek LLM §5: the share of answers that never end, here within 128 tokens). An ended command goes on.
"""

import argparse
import ast
import json
import random
import statistics
import sysconfig
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from dsv3_lightning.cli import main as dsv3
from dsv3_lightning.common.history import scalar_history
from dsv3_lightning.common.table import table
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.evaluation.rewards import repeats
from dsv3_lightning.studies.measured import Measured, made_by, results_of, write_measured

QUIET = [
    "trainer.precision=32", "callbacks.sample_text=null", "callbacks.router_probe=null", "data.sequence_length=128",
    "callbacks.throughput.peak_flops=1e11", "model.num_nextn_predict_layers=0", "callbacks.mtp_weight=null",
    "data.isolate_documents=true", "data.mask_document_ends=true",
    "callbacks.checkpoint={every_n_steps: 100, keep: 1, keep_best: 0}",
]  # fmt: skip
BEGIN, LIMIT, HELD_OUT = 32, 128, 300  # characters of a prompt, tokens of an answer, paragraphs


def paragraphs() -> list[str]:
    """Paragraphs of docstrings in the standard library, of 100 to 300 characters, in the order of their files."""
    root, found = Path(sysconfig.get_path("stdlib")), {}
    for path in sorted(root.rglob("*.py")):
        if {"test", "tests", "site-packages", "idle_test", "lib2to3"} & set(path.parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                found |= dict.fromkeys(" ".join(part.split()) for part in text.split("\n\n"))
    return [text for text in found if 100 <= len(text) <= 300 and ">>>" not in text]


def make_data(folder: Path, seed: int, asked: int) -> None:
    """Writes the texts, the questions of `dsv3 sample`, and the held-out ones as a task."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = paragraphs()
    random.Random(seed).shuffle(texts)
    lines = []
    for text in texts:
        cut = text.index(" ", BEGIN) if " " in text[BEGIN:] else BEGIN
        lines.append({"prompt": text[:cut], "answer": text[cut:]})
    first: list[Any] = [{"task": "continued", "checker": "exact", "max_new_tokens": LIMIT}]
    files = {"texts": [{"text": text} for text in texts[HELD_OUT:]], "asked": lines[HELD_OUT : HELD_OUT + asked],
             "continued": first + lines[:HELD_OUT]}  # fmt: skip
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content), encoding="utf-8")
    print(f"{folder}: {len(texts):,} paragraphs")


def measure(folder: Path, name: str) -> dict[str, float]:
    """Of a run: the share of greedy answers that never end, of repeated token pairs, and the gold bits per byte."""
    out = folder / f"{name}_answers"
    assert dsv3(["evaluate", str(folder / name), "--tasks", str(folder / "continued.jsonl"), "--protocol", "repetition",
                 "--max-new-tokens", str(LIMIT), "--out", str(out)]) == 0  # fmt: skip
    metrics = json.loads((out / "results.json").read_text(encoding="utf-8"))["tasks"]["continued"]["metrics"]
    lines = (out / "answers/continued.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["answers"][0]["text"] for line in lines]
    tokenizer = Tokenizer.from_file(folder / name)
    return {
        "ratio": metrics["never_ended"]["value"], "bits": metrics["gold_bits_per_byte"]["value"],
        "repeated": -statistics.fmean(repeats(texts, [tokenizer.encode(text) for text in texts])),
    }  # fmt: skip


def one_seed(folder: Path, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    make_data(folder, seed, arguments.asked)
    common = [f"run.dir={folder}", f"run.seed={seed}", *QUIET]
    begun = time.process_time()
    text = [
        "run.name=text", f"data.paths=[{folder / 'texts.jsonl'}]", f"trainer.max_steps={arguments.text_steps}",
        f"trainer.val_check_interval={arguments.text_steps}", "data.batch_size=16", "trainer.log_every_n_steps=50",
    ]  # fmt: skip
    assert dsv3(["run", "nano", *common, *text]) == 0
    before = measure(folder, "text")
    pairs = folder / "pairs.jsonl"
    if not pairs.exists():
        asked = [str(folder / "text"), str(folder / "asked.jsonl"), str(pairs), "--pairs", "--samples", "2"]
        asked += ["--reward", "dsv3_lightning.evaluation.rewards:repeats", "--threshold", "-0.3", "--seed", str(seed)]
        asked += ["--temperature", "0.3", "--max-new-tokens", "96"]
        assert dsv3(["sample", *asked]) == 0
    tuned = [
        "run.name=dpo", f"init_from={folder / 'text'}", f"data.paths=[{pairs}]", f"dpo={{beta: {arguments.beta}}}",
        f"trainer.max_steps={arguments.steps}", f"trainer.val_check_interval={arguments.steps}", "data.batch_size=16",
        "data.validation_fraction=0.1", f"optimizer.lr={arguments.lr}", "optimizer.weight_decay=0",
        "optimizer.warmup_steps=10", "optimizer.phases=[{until: 1.0, shape: cosine, to: 0.0}]",
        "callbacks.expert_bias.speed=0", "data.sequence_length=192",
    ]  # fmt: skip
    assert dsv3(["run", "nano", *common, *tuned]) == 0
    curves = scalar_history(folder / "dpo")
    return {
        "seed": seed, "before": before, "after": measure(folder, "dpo"),
        "pairs": len(pairs.read_text(encoding="utf-8").splitlines()), "accuracy": curves["val/accuracy"][1][-1],
        "cpu_seconds": round(time.process_time() - begun),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds (default: 1 2 3)")
    parser.add_argument("--dir", type=Path, default=Path("runs/reproduce/repetition"), help="default: %(default)s")
    parser.add_argument("--text-steps", type=int, default=250, help="of pre-training (default: %(default)s)")
    parser.add_argument("--asked", type=int, default=800, help="paragraphs to continue for pairs")
    parser.add_argument("--steps", type=int, default=60, help="of DPO, 16 pairs each (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-4, help="of DPO (default: %(default)s)")
    parser.add_argument("--beta", type=float, default=0.1, help="of DPO (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.dir.resolve()
    rows = [("seed", "pairs", "never ended", "repeated pairs of tokens", "bits per byte", "accuracy", "CPU s")]
    results = []
    for result in results_of(folder, arguments.seeds, lambda path, seed: one_seed(path, seed, arguments)):
        results.append(result)
        before, after = result["before"], result["after"]
        rows.append((
            str(result["seed"]), f"{result['pairs']:,}", f"{before['ratio']:.1%} to {after['ratio']:.1%}",
            f"{before['repeated']:.1%} to {after['repeated']:.1%}", f"{before['bits']:.3f} to {after['bits']:.3f}",
            f"{result['accuracy']:.2f}", str(result["cpu_seconds"]),
        ))  # fmt: skip
    sides = ([result[when]["ratio"] for result in results] for when in ("after", "before"))
    claim = Measured("DPO lowers the repetition ratio", "arXiv 2401.02954 §5", "said, without a number", *sides,
                     "{:.3f}", *made_by("benchmarks/repetition.py", arguments.seeds))  # fmt: skip
    write_measured(folder, [claim])
    print(table(rows))


if __name__ == "__main__":
    main()
