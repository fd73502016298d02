"""GRPO on verifiable arithmetic: learning curves of several seeds, beside more tuning on the same pairs.

python benchmarks/reinforce.py --seeds 1 2 3 --dir runs/reproduce/reinforce
Sums of two numbers of two digits, answered with the digits in reverse, one character a token, on nano's shape. A model
is tuned on 1,000 of the 10,000 sums; GRPO starts from its first checkpoint with pass@1 of 0.3 to 0.6, and sees the
other sums but 200 held-out ones, never an answer. The control is the end of the tuning itself, on the same 1,000 pairs.
Every checkpoint is measured on the held-out sums, with 16 answers to each at temperature 1. An ended command goes on.
"""

import argparse
import json
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from dsv3_lightning.cli import main as dsv3
from dsv3_lightning.common.plots import save_figure
from dsv3_lightning.common.table import table
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.inference.chat import chat_prompt
from dsv3_lightning.inference.rollout import Key, sample_answers
from dsv3_lightning.inference.scoring import score
from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.parallel.checkpoints.names import step_files, step_in
from dsv3_lightning.runs.models import find_checkpoint, load_model
from dsv3_lightning.studies.measured import Measured, made_by, results_of, write_measured

SAMPLES, LEAST, MOST = 16, 0.3, 0.6  # answers to a question; pass@1 of the model that GRPO starts from
QUIET = [
    "trainer.precision=32", "callbacks.sample_text=null", "callbacks.router_probe=null", "trainer.limit_val_batches=0",
    "callbacks.throughput.peak_flops=1e11", "model.vocab_size=300", "model.num_nextn_predict_layers=0",
    "callbacks.mtp_weight=null", "data.validation_fraction=0.02", "callbacks.expert_bias.speed=0",
]  # fmt: skip
Curve = dict[int, dict[str, float]]  # by step
PANELS = {
    "pass@1": "pass@1: mean over 16 answers at temperature 1",
    "pass@16": "pass@16: any of 16 answers",
    "greedy": "accuracy of the greedy answer",
    "kl": "KL from the start (nats per token)",
    "entropy": "entropy (nats per token)",
    "length": "length of answers (tokens)",
}


def make_data(folder: Path, seed: int) -> list[tuple[str, str]]:
    """Writes tuning pairs, prompts and a tokenizer without merges; returns the held-out questions and answers."""
    folder.mkdir(parents=True, exist_ok=True)
    sums = [(f"{a:02}+{b:02}=", f"{a + b:03}"[::-1]) for a in range(100) for b in range(100)]
    random.Random(seed).shuffle(sums)
    shown, held_out = sums[:1000], sums[1000:1200]
    lines = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in shown]
    asked = [{"messages": [{"role": "user", "content": q}], "answer": a} for q, a in sums[:1000] + sums[1200:]]
    for name, content in (("pairs", lines), ("prompts", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content), encoding="utf-8")
    Tokenizer.train(["a b"], 300).save(folder)
    return held_out


def load(path: Path) -> tuple[Transformer, Tokenizer]:
    found = find_checkpoint(path)
    return load_model(found.checkpoint, found.config.model), found.tokenizer


def measure(path: Path, held_out: list[tuple[str, str]], start: Path | None = None) -> dict[str, float]:
    """What a checkpoint answers. start: the checkpoint that the KL divergence is from, estimated from the samples."""
    model, tokenizer = load(path)
    prompts = [chat_prompt(tokenizer, [("user", question)]) for question, _ in held_out]
    keys = [Key(0, 0, number) for number in range(len(prompts))]
    right = {}
    for kind, samples, temperature in (("greedy", 1, 0.0), ("sampled", SAMPLES, 1.0)):
        sampled = sample_answers(model, prompts, keys, samples, 5, temperature, tokenizer.end_ids)
        right[kind] = torch.tensor([
            [ended and tokenizer.decode(ids[:-1]) == answer for ids, ended in zip(one.tokens, one.ended)]
            for one, (_, answer) in zip(sampled, held_out, strict=True)
        ]).double()  # fmt: skip
    pairs = [(prompt, ids) for prompt, one in zip(prompts, sampled, strict=True) for ids in one.tokens]
    tokens = sum(len(ids) for _, ids in pairs)
    log_p = sum(one.total for one in score(model, pairs))
    found = {
        "pass@1": float(right["sampled"].mean()), "pass@16": float(right["sampled"].amax(1).mean()),
        "greedy": float(right["greedy"].mean()), "entropy": -log_p / tokens, "length": tokens / len(pairs),
    }  # fmt: skip
    if start is not None:
        found["kl"] = (log_p - sum(one.total for one in score(load(start)[0], pairs))) / tokens
    return found


def tune(folder: Path, seed: int, steps: int) -> None:
    common = [f"run.dir={folder}", f"run.seed={seed}", f"data.tokenizer={folder}", *QUIET]
    settings = [
        "run.name=tuned", f"data.paths=[{folder / 'pairs.jsonl'}]", "data.text_key=messages", "data.batch_size=16",
        "data.sequence_length=64", "data.mask_document_ends=true", "data.isolate_documents=true",
        f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}", "trainer.log_every_n_steps=50",
        "callbacks.checkpoint={every_n_steps: 50, keep: 99, keep_best: 0}",
    ]  # fmt: skip
    assert dsv3(["run", "nano", *common, *settings]) == 0


def reinforce(folder: Path, seed: int, start: Path, steps: int, lr: float, prompts: int) -> None:
    common = [f"run.dir={folder}", f"run.seed={seed}", f"data.tokenizer={folder}", *QUIET]
    if not (folder / "start").exists():
        assert dsv3(["export", str(start), str(folder / "start")]) == 0
    settings = [
        "run.name=grpo", f"init_from={folder / 'start'}", f"data.paths=[{folder / 'prompts.jsonl'}]",
        f"data.batch_size={prompts}", "data.sequence_length=16", f"trainer.max_steps={steps}", "loss.balance=none",
        "grpo={rewards: ['dsv3_lightning.evaluation.rewards:exact'], group_size: 16, max_new_tokens: 5, scale: none}",
        f"optimizer.lr={lr}", "optimizer.weight_decay=0", "optimizer.warmup_steps=5",
        "optimizer.phases=[{until: 1.0, shape: linear, to: 0.0}]", f"trainer.val_check_interval={steps}",
        "callbacks.checkpoint={every_n_steps: 25, keep: 99, keep_best: 0}",
    ]  # fmt: skip
    assert dsv3(["run", "nano", *common, *settings]) == 0


def measured(folder: Path, paths: list[Path], held_out: list[tuple[str, str]], start: Path | None, bar: float) -> Curve:
    """The measurements of checkpoints by step, kept in a file; up to the first with pass@1 of at least `bar`."""
    stored = folder / "measured.json"
    known = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else {}
    found: Curve = {}
    for path in paths:
        step = step_in(path)
        if str(step) not in known:
            known[str(step)] = measure(path, held_out, start)
            stored.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            shown = "  ".join(f"{name} {value:.3f}" for name, value in known[str(step)].items())
            print(f"{folder.parent.name}/{folder.name}, step {step}:  {shown}", flush=True)
        found[step] = known[str(step)]
        if found[step]["pass@1"] >= bar:
            break
    return found


def one_seed(folder: Path, seed: int, tuning_steps: int, steps: int, lr: float, prompts: int) -> dict[str, Any]:
    """Curves of both ways by step, and their processor seconds without measurements."""
    held_out = make_data(folder, seed)
    seconds = [time.process_time()]
    tune(folder, seed, tuning_steps)
    seconds.append(time.process_time())
    checkpoints = sorted(step_files(folder / "tuned/checkpoints"), key=step_in)
    *_, (begin, before) = measured(folder / "tuned", checkpoints, held_out, None, LEAST).items()
    assert LEAST <= before["pass@1"] <= MOST, f"no checkpoint with pass@1 between {LEAST} and {MOST}; take another seed"
    (start,) = (path for path in checkpoints if step_in(path) == begin)
    seconds.append(time.process_time())
    reinforce(folder, seed, start, steps, lr, prompts)
    seconds.append(time.process_time())
    later = [path for path in checkpoints if step_in(path) >= begin]
    control = measured(folder / "tuned", later, held_out, None, 2.0)
    checkpoints = sorted(step_files(folder / "grpo/checkpoints"), key=step_in)
    curve = {0: before | {"kl": 0.0}} | measured(folder / "grpo", checkpoints, held_out, start, 2.0)
    return {
        "seed": seed, "start": begin, "grpo": curve, "control": {step - begin: one for step, one in control.items()},
        "cpu_seconds": [round(seconds[1] - seconds[0]), round(seconds[3] - seconds[2])],
    }  # fmt: skip


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """The curves of all seeds, by optimizer steps after the common start."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 3).flatten(), PANELS.items(), strict=True):
        for way, color, label in (("grpo", "C0", "GRPO"), ("control", "C1", "more tuning on the same pairs")):
            for number, result in enumerate(results):
                points = [(step, one[name]) for step, one in result[way].items() if name in one]
                if points:
                    axes.plot(*zip(*points), color=color, alpha=0.7, marker=".", label=label if not number else None)
        axes.set(title=title, xlabel="optimizer steps after the start")
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path, dpi=70)


def last(curve: Curve) -> dict[str, float]:
    return curve[max(curve)]


def claims(results: list[dict[str, Any]]) -> list[Measured]:
    before = [result["grpo"][0]["pass@1"] for result in results]
    after, control = ([last(result[way])["pass@1"] for result in results] for way in ("grpo", "control"))
    gains = [one - other for one, other in zip(after, before)]
    made = made_by("benchmarks/reinforce.py", [result["seed"] for result in results])
    paper = "arXiv 2402.03300 table 5"
    return [
        Measured("GRPO raises pass@1 by at least 0.1 without being shown an answer", paper,
                 "82.9 to 88.2 % on GSM8K, 46.8 to 51.7 % on MATH (7B)", 0.1, gains, "{:.3f}", *made),
        Measured("GRPO ends above more tuning on the same 1,000 pairs (a control of ours)", paper,
                 "no number: more tuning is not compared", control, after, "{:.3f}", *made),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds (default: 1 2 3)")
    parser.add_argument("--dir", type=Path, default=Path("runs/reproduce/reinforce"), help="default: %(default)s")
    parser.add_argument("--tuning-steps", type=int, default=800, help="of the tuning and of the control")
    parser.add_argument("--steps", type=int, default=200, help="of GRPO (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=32, help="of a step, 16 answers each (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-4, help="of GRPO, falling to 0 (default: %(default)s)")
    parser.add_argument("--picture", type=Path, help="a PNG file (default: curves.png in the folder)")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    folder = arguments.dir.resolve()
    rows = [("seed", "start", "GRPO", "control", "gain", "pass@16", "greedy", "KL", "CPU s")]
    results = []
    settings = arguments.tuning_steps, arguments.steps, arguments.lr, arguments.prompts
    for result in results_of(folder, arguments.seeds, lambda path, seed: one_seed(path, seed, *settings)):
        for way in ("grpo", "control"):
            result[way] = {int(step): one for step, one in result[way].items()}
        results.append(result)
        before, after, control = result["grpo"][0], last(result["grpo"]), last(result["control"])
        rows.append((
            str(result["seed"]), f"{before['pass@1']:.3f} at step {result['start']}", f"{after['pass@1']:.3f}",
            f"{control['pass@1']:.3f}", f"{after['pass@1'] - before['pass@1']:+.3f}",
            f"{before['pass@16']:.2f} to {after['pass@16']:.2f}", f"{before['greedy']:.2f} to {after['greedy']:.2f}",
            f"{after['kl']:.3f}", " + ".join(map(str, result["cpu_seconds"])),
        ))  # fmt: skip
    found = claims(results)
    write_measured(folder, found)
    draw(results, arguments.picture or folder / "curves.png")
    print(table(rows))
    gains = found[0].high
    assert isinstance(gains, list)
    print(f"gain of pass@1: mean {statistics.fmean(gains):+.3f}, smallest {min(gains):+.3f}")


if __name__ == "__main__":
    main()
