"""GRPO on verifiable arithmetic: learning curves of several seeds, beside more tuning on the same pairs.

python benchmarks/reinforce.py --seeds 3 --dir runs/reinforce
Sums of two numbers of two digits, answered with the digits in reverse, one character a token, on nano's shape. A model
is tuned on 1,000 of the 10,000 sums; GRPO starts from its first checkpoint with pass@1 of at least 0.45, and sees the
other sums but 200 held-out ones, never an answer. The control is the end of the tuning itself, on the same 1,000 pairs.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from dsv3_lightning.cli import main as dsv3
from dsv3_lightning.common.history import scalar_history
from dsv3_lightning.common.table import table
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.inference.chat import chat_prompt
from dsv3_lightning.inference.rollout import Key, sample_answers
from dsv3_lightning.parallel.checkpoints.names import step_files, step_in
from dsv3_lightning.runs.models import find_checkpoint, load_model

SAMPLES = 16
QUIET = [
    "trainer.precision=32", "callbacks.sample_text=null", "callbacks.router_probe=null",
    "callbacks.throughput.peak_flops=1e11", "model.vocab_size=300", "model.num_nextn_predict_layers=0",
    "callbacks.mtp_weight=null", "data.validation_fraction=0.02", "callbacks.expert_bias.speed=0",
]  # fmt: skip


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


def measure(path: Path, held_out: list[tuple[str, str]], most: int = SAMPLES) -> dict[str, float]:
    """pass@1 as the mean of `most` samples at temperature 1, pass@k and greedy accuracy of a checkpoint or run."""
    found = find_checkpoint(path)
    model, tokenizer = load_model(found.checkpoint, found.config.model), found.tokenizer
    prompts = [chat_prompt(tokenizer, [("user", question)]) for question, _ in held_out]
    keys = [Key(0, 0, number) for number in range(len(prompts))]
    scores = {}
    for kind, samples, temperature in (("sampled", most, 1.0), ("greedy", 1, 0.0)):
        sampled = sample_answers(model, prompts, keys, samples, 5, temperature, tokenizer.end_ids)
        scores[kind] = torch.tensor([
            [ended and tokenizer.decode(ids[:-1]) == answer for ids, ended in zip(one.tokens, one.ended)]
            for one, (_, answer) in zip(sampled, held_out, strict=True)
        ]).double()  # fmt: skip
    return {"pass@1": float(scores["sampled"].mean()), "pass@16": float(scores["sampled"].amax(1).mean()),
            "greedy": float(scores["greedy"].mean())}  # fmt: skip


def one_seed(folder: Path, seed: int, tuning_steps: int, steps: int, lr: float, prompts: int) -> dict[str, Any]:
    held_out = make_data(folder, seed)
    common = [f"run.dir={folder}", f"run.seed={seed}", f"data.tokenizer={folder}", *QUIET]
    begun = time.process_time()
    tune = [
        "run.name=tuned", f"data.paths=[{folder / 'pairs.jsonl'}]", "data.text_key=messages", "data.batch_size=16",
        "data.sequence_length=64", "data.mask_document_ends=true", "data.isolate_documents=true",
        f"trainer.max_steps={tuning_steps}", "trainer.val_check_interval=400", "trainer.log_every_n_steps=50",
        "callbacks.checkpoint={every_n_steps: 50, keep: 99, keep_best: 0}",
    ]  # fmt: skip
    assert dsv3(["run", "nano", *common, *tune]) == 0
    tuning_seconds = time.process_time() - begun
    start: Path | None = None
    stored = folder / "start.json"  # an earlier call, which was ended during GRPO, has found it
    if stored.exists():
        start = folder / f"tuned/checkpoints/step={json.loads(stored.read_text(encoding='utf-8'))}.ckpt"
    for path in [] if start else sorted(step_files(folder / "tuned/checkpoints"), key=step_in):
        sampled = measure(path, held_out, 4)["pass@1"]
        print(f"seed {seed}: step {step_in(path)} of tuning: pass@1 {sampled:.3f}", flush=True)
        if sampled >= 0.45:
            start = path
            stored.write_text(json.dumps(step_in(path)), encoding="utf-8")
            break
    assert start is not None, "the tuning never reached pass@1 of 0.45"
    before = measure(start, held_out)
    if not (folder / "start").exists():
        assert dsv3(["export", str(start), str(folder / "start")]) == 0
    begun = time.process_time()
    reinforce = [
        "run.name=grpo", f"init_from={folder / 'start'}", f"data.paths=[{folder / 'prompts.jsonl'}]",
        f"data.batch_size={prompts}", "data.sequence_length=16", f"trainer.max_steps={steps}", "loss.balance=none",
        "grpo={rewards: ['dsv3_lightning.evaluation.rewards:exact'], group_size: 16, max_new_tokens: 5, scale: none, "
        "validation_samples: 4}", f"optimizer.lr={lr}", "optimizer.weight_decay=0", "optimizer.warmup_steps=5",
        "optimizer.phases=[{until: 1.0, shape: linear, to: 0.0}]", f"trainer.val_check_interval={max(1, steps // 4)}",
        f"trainer.limit_val_batches={96 // prompts}", "callbacks.checkpoint={every_n_steps: 50, keep: 1, keep_best: 0}",
    ]  # fmt: skip
    assert dsv3(["run", "nano", *common, *reinforce]) == 0
    curves = scalar_history(folder / "grpo")
    last = {name: curves[f"grpo/{name}"][1][-1] for name in ("entropy", "length", "without_contrast")}
    return {
        "seed": seed, "start_step": step_in(start), "before": before, "after": measure(folder / "grpo", held_out),
        "control": measure(folder / "tuned", held_out), "last": last,
        "cpu_seconds": [round(tuning_seconds), round(time.process_time() - begun)],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds (default: 1 2 3)")
    parser.add_argument(
        "--dir", type=Path, default=Path("runs/reinforce"), help="where runs are (default: %(default)s)"
    )
    parser.add_argument("--tuning-steps", type=int, default=800, help="of the tuning and of the control")
    parser.add_argument("--steps", type=int, default=200, help="of GRPO (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=32, help="of a step, 16 answers each (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-4, help="of GRPO, falling to 0 (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [("seed", "start", "GRPO", "control", "gain", "pass@16", "greedy", "CPU s")]
    gains = []
    for seed in arguments.seeds:
        folder = arguments.dir.resolve() / f"seed{seed}"
        result = one_seed(folder, seed, arguments.tuning_steps, arguments.steps, arguments.lr, arguments.prompts)
        (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        before, after, control = (result[name] for name in ("before", "after", "control"))
        gains.append(after["pass@1"] - before["pass@1"])
        rows.append((
            str(seed), f"{before['pass@1']:.3f} at step {result['start_step']}", f"{after['pass@1']:.3f}",
            f"{control['pass@1']:.3f}", f"{gains[-1]:+.3f}", f"{before['pass@16']:.2f} to {after['pass@16']:.2f}",
            f"{before['greedy']:.2f} to {after['greedy']:.2f}", " + ".join(map(str, result["cpu_seconds"])),
        ))  # fmt: skip
    print(table(rows))
    print(f"gain of pass@1: mean {statistics.fmean(gains):+.3f}, smallest {min(gains):+.3f}")


if __name__ == "__main__":
    main()
