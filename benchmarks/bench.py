"""Speed and memory in one command: training by part, peers, an earlier commit, start-up, and the other benchmarks.

    python benchmarks/bench.py [--rounds 8] [--batch-size 16] [--precision bf16] [--reference cd9e6bc] [--json FILE]
                               [--only PART ...]

All times but those of the other benchmarks are CPU times of one thread, so that other work on the machine matters
little. What is compared is timed in turns, in one process; the reference commit is checked out into a temporary git
worktree. A part's bound is the larger of its FLOP at the measured rate of matrix products and its bytes at the measured
rate of copies: of its weights, inputs and outputs, once for the forward and twice for the backward pass.
"""

import argparse
import importlib
import itertools
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dsv3_lightning.common.table import table
from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import Config, check
from dsv3_lightning.model.experts import Experts
from dsv3_lightning.model.fused import compile_all
from dsv3_lightning.model.moe import MoE
from dsv3_lightning.model.rope import cos_sin
from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.planning.flops import training_flop_per_token
from dsv3_lightning.training.compiling import obstacle_here
from dsv3_lightning.training.optimizer import build_optimizer

ROOT = Path(__file__).parents[1]
REFERENCE = "cd9e6bc"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OTHERS = ("loader.py", "metrics.py", "memory.py")
BATCHES = 16  # that a comparison repeats
PARTS = ("parts", "reference", "peers", "decoding", "startup", "others")


class Part(NamedTuple):
    """A part of a step. flop, bytes: of its forward and backward pass. times: how often a step has it."""

    name: str
    run: Callable[[], Any]
    flop: float
    bytes: float
    times: int = 1


def cpu_ms(run: Callable[[], Any], rounds: int) -> float:
    """The median CPU time of some calls after two others, in ms."""
    times = []
    for _ in range(rounds + 2):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times[2:])


def rates(dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a product of 2,048 x 2,048 matrices, and bytes/s read and written by a copy of 256 MB."""
    a = torch.randn(2048, 2048).to(dtype)
    source, target = torch.zeros(2, 2**27, dtype=torch.uint8)
    return 2 * 2048**3 / cpu_ms(lambda: a @ a, 5) * 1e3, 2 * source.nbytes / cpu_ms(
        lambda: target.copy_(source), 5
    ) * 1e3


def passes(module: torch.nn.Module, run: Callable[[], torch.Tensor], dtype: torch.dtype) -> Callable[[], None]:
    """The forward and backward pass of `run`, from gradients of ones."""

    def both() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = run()
        out.backward(torch.ones_like(out))
        module.zero_grad()

    return both


def parts_of(config: Config, dtype: torch.dtype) -> list[Part]:
    """The parts of a training step, with as many tokens as the step has."""
    shape, B, T = config.model, config.data.batch_size, config.data.sequence_length
    model = Transformer(shape)
    model.init_weights(0)
    block, N, D, V = model.layers[-1], B * T, shape.hidden_size, shape.vocab_size
    moe, wide, narrow = block.mlp, 4, dtype.itemsize
    assert isinstance(moe, MoE) and isinstance(moe.experts, Experts)
    x_BTD = torch.randn(B, T, D, requires_grad=True)
    x_ND = torch.randn(N, D).to(dtype).requires_grad_()
    targets_BPT = torch.randint(V, (B, 1, T))
    rope = cos_sin(shape, torch.arange(T))
    with torch.no_grad():
        routing = moe.gate(x_ND)
    gates_NK = routing.gates_NK.requires_grad_()
    sent = moe.dispatcher.dispatch(x_ND, routing.experts_NK, gates_NK)
    inputs = tuple(x.detach().requires_grad_(x.is_floating_point()) for x in moe.dispatcher.receive(sent))
    y_RD = torch.randn(len(inputs[0]), D).to(dtype).requires_grad_()

    def there_and_back() -> torch.Tensor:
        sent = moe.dispatcher.dispatch(x_ND, routing.experts_NK, gates_NK)
        out_ND = moe.dispatcher.combine(moe.dispatcher.send_back(y_RD, sent))
        return out_ND + 0 * sent.x_RD.sum() + 0 * sent.gates_R.sum()

    def loss() -> torch.Tensor:
        total: torch.Tensor = model.lm_head.loss([x_BTD], targets_BPT)
        return total

    attention, H, K = block.self_attn, shape.num_attention_heads, shape.num_experts_per_tok
    weights = sum(p.numel() for p in attention.parameters())
    experts = K * 3 * D * shape.moe_intermediate_size
    scores = H * T * (shape.qk_head_dim + shape.v_head_dim) / 2
    layers, moe_layers = shape.num_hidden_layers + shape.mtp_depth, shape.num_moe_layers
    optimizer = build_optimizer(model, config.optimizer)

    (mtp,) = model.mtp

    def mtp_input() -> torch.Tensor:
        return mtp.eh_proj(torch.cat((mtp.enorm(x_BTD), mtp.hnorm(x_BTD)), -1))

    def update() -> None:
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()

    numbers = sum(p.numel() for p in model.parameters())
    of_experts = sum(p.numel() for p in moe.experts.parameters())
    return [
        Part("attention", passes(model, lambda: attention(x_BTD, rope), dtype), 6 * N * (weights + scores),
             3 * (2 * N * D * wide + weights * wide), layers),
        Part("norms", passes(model, lambda: block.input_layernorm(x_BTD), dtype), 0, 3 * N * D * (wide + narrow),
             2 * layers + 1),
        Part("router", passes(model, lambda: moe.gate(x_ND).gates_NK, dtype), 6 * N * D * shape.n_routed_experts,
             3 * N * (D * narrow + shape.n_routed_experts * wide), moe_layers),
        Part("dispatch and combine", passes(model, there_and_back, dtype), 0, 8 * N * K * D * narrow, moe_layers),
        Part("experts", passes(model, lambda: moe.experts(*inputs), dtype), 6 * N * experts,
             3 * (2 * N * K * D * narrow + of_experts * wide), moe_layers),
        Part("shared experts", passes(model, lambda: moe.shared_experts(x_ND), dtype),
             6 * N * 3 * D * shape.moe_intermediate_size * shape.n_shared_experts, 6 * N * D * narrow, moe_layers),
        Part("input of the MTP module", passes(model, mtp_input, dtype), 12 * N * D * D,
             3 * (2 * N * D * wide + N * D * narrow + 2 * D * D * wide), shape.mtp_depth),
        Part("head and loss", passes(model, loss, dtype), 6 * N * D * V, 3 * D * V * wide, 1 + shape.mtp_depth),
        Part("optimizer", update, 0, 7 * numbers * wide),
    ]  # fmt: skip


def by_part(config: Config, dtype: torch.dtype, rounds: int) -> tuple[list[list[str]], dict[str, Any]]:
    flops, copies = rates(dtype)
    rows, found = [], {"flop_per_s": flops, "bytes_per_s": copies, "parts": {}}
    for part in parts_of(config, dtype):
        ms = cpu_ms(part.run, rounds)
        bound = 1e3 * max(part.flop / flops, part.bytes / copies)
        found["parts"][part.name] = {"ms": ms, "times": part.times, "bound_ms": bound}
        rows.append([part.name, f"{part.times} x {ms:.2f}", f"{part.times * ms:.1f}", f"{part.times * bound:.1f}",
                     f"{bound / ms:.0%}"])  # fmt: skip
    return rows, found


@contextmanager
def earlier(commit: str) -> Iterator[Path]:
    """A worktree of the commit, which ends with the block."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reference"
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--detach", "-q", str(path), commit], check=True)
        try:
            yield path
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(path)], check=True)


def steps_of(path: Path, mtp: int, batch_size: int, dtype: torch.dtype) -> Callable[[], None]:
    """A training step of the `laptop` model by the package in this folder, whatever is imported already."""
    ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "dsv3_lightning"}
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, str(path))
    importlib.invalidate_caches()
    try:
        settings = importlib.import_module("dsv3_lightning.config.compose").compose(
            ["laptop"], [f"model.num_nextn_predict_layers={mtp}"]
        )
        shape = importlib.import_module("dsv3_lightning.config.schema").check(settings.tree).model
        transformer = importlib.import_module("dsv3_lightning.model.transformer")
        assert Path(transformer.__file__).is_relative_to(path), f"{transformer.__file__} is not of {path}"
        model = transformer.Transformer(shape)
        if path == ROOT and obstacle_here("cpu") is None:
            importlib.import_module("dsv3_lightning.model.fused").compile_all()
    finally:
        sys.path.remove(str(path))
        for name in [name for name in sys.modules if name.split(".")[0] == "dsv3_lightning"]:
            del sys.modules[name]
        sys.modules.update(ours)
    model.init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batches = itertools.cycle(
        torch.randint(4096, (BATCHES, batch_size, 129 + mtp), generator=torch.Generator().manual_seed(0))
    )

    def step() -> None:
        tokens = next(batches)
        targets = torch.stack([tokens[:, 1 + p : 129 + p] for p in range(1 + mtp)], 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            losses = model.losses(tokens, torch.ones_like(tokens, dtype=torch.bool), targets)
            (losses[0].sum() / targets.numel() + 1e-4 * losses.balance["sequence"].sum()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def in_turns(one: Callable[[], None], other: Callable[[], None], rounds: int) -> dict[str, float]:
    """Median CPU times in ms, and the median, least and largest ratio of a round.

    First each runs as often as there are batches: oneDNN compiles a program for each new shape of a product.
    """
    for run in (one, other):
        cpu_ms(run, BATCHES)
    times = [[cpu_ms(run, 1) for run in (one, other)] for _ in range(rounds)]
    ratios = [b / a for a, b in times]
    ours, others = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "ms": ours,
        "other_ms": others,
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
    }


def reference(commit: str, batch_size: int, dtype: torch.dtype, rounds: int) -> dict[str, dict[str, float]]:
    with earlier(commit) as path:
        return {
            f"laptop, {depth} MTP modules": in_turns(
                steps_of(ROOT, depth, batch_size, dtype), steps_of(path, depth, batch_size, dtype), rounds
            )
            for depth in (0, 1)
        }


def peers(batch_size: int, dtype: torch.dtype, rounds: int) -> dict[str, dict[str, float]]:
    """transformers' implementations of the same shape without MTP. share: of the measured rate of products, ours."""
    from throughput import our_step, their_step  # beside this file, and it imports transformers

    config = check(compose(["laptop"], ["model.num_nextn_predict_layers=0"]).tree)
    tokens = torch.randint(config.model.vocab_size, (BATCHES, batch_size, config.data.sequence_length + 1))
    ours = our_step(config.model, tokens, dtype)
    flop = training_flop_per_token(config.model, config.data.sequence_length) * batch_size * config.data.sequence_length
    found = {}
    for name in ("eager", "batched_mm", "grouped_mm"):
        found[f"transformers, {name}"] = in_turns(ours, their_step(config.model, tokens, dtype, name), rounds)
        rate, _ = rates(dtype)
        found[f"transformers, {name}"]["share"] = 1e3 * flop / found[f"transformers, {name}"]["ms"] / rate
    return found


def decoding() -> dict[str, float]:
    """ms of a token of the `laptop` model and of one with 12 layers, with random weights, and the costs of drafts."""
    from decoding import costs  # beside this file, and it imports transformers

    found = {}
    for layers in (3, 12):
        config = check(compose(["laptop"], [f"model.num_hidden_layers={layers}"]).tree)
        model = Transformer(config.model)
        model.init_weights(0)
        one, draft, two = costs(model, list(range(10)), time.process_time)
        found |= {f"{layers} layers: ms of a token": 1e3 * one, f"{layers} layers: a draft, in tokens": draft,
                  f"{layers} layers: two tokens at once, in tokens": two}  # fmt: skip
    return found


def startup() -> dict[str, float]:
    """CPU seconds of commands, and the peak memory of the largest, in MiB."""
    commands = {
        "import dsv3_lightning": ["-c", "import dsv3_lightning"],
        "dsv3 --help": ["-m", "dsv3_lightning", "--help"],
        "dsv3 plan laptop": ["-m", "dsv3_lightning", "plan", "laptop"],
        "import of what a run needs": ["-c", "import dsv3_lightning.runs.fit"],
    }
    found = {}
    for name, words in commands.items():
        found[name] = of_command(words)
    with tempfile.TemporaryDirectory() as folder:
        run = ["-m", "dsv3_lightning", "run", "laptop", f"run.dir={folder}", "optimizer.warmup_steps=0",
               "trainer.max_steps=1", "trainer.val_check_interval=1", "trainer.limit_val_batches=1"]  # fmt: skip
        of_command([*run, "run.name=first"])  # prepares the data
        found["dsv3 run laptop, one step, with prepared data"] = of_command([*run, "run.name=second"])
    found["peak MiB"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return found


def of_command(words: list[str]) -> float:
    """CPU seconds of Python with these words."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def machine() -> dict[str, str]:
    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    names = [line.split(":")[1].strip() for line in cpu_info() if line.startswith("model name")]
    return {
        "date": time.strftime("%Y-%m-%d"), "commit": commit.stdout.strip(), "torch": torch.__version__,
        "python": platform.python_version(), "cpu": names[0] if names else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip


def cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def compared(name: str, found: dict[str, float]) -> list[str]:
    return [name, f"{found['ms']:.0f}", f"{found['other_ms']:.0f}", f"{found['ratio']:.2f}",
            f"{found['least']:.2f} to {found['most']:.2f}"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--reference", default=REFERENCE)
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "bench.json")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dtype, rounds = DTYPES[arguments.precision], arguments.rounds
    if obstacle_here("cpu") is None:
        compile_all()
    found: dict[str, Any] = {"machine": machine(), "precision": arguments.precision}
    print(", ".join(found["machine"].values()), flush=True)
    config = check(compose(["laptop"], [f"data.batch_size={arguments.batch_size}"]).tree)
    if "parts" in arguments.only:
        rows, found["step"] = by_part(config, dtype, rounds)
        print(table([["part", "ms", "ms in a step", "bound", "share of the bound"], *rows]), flush=True)
    comparisons: dict[str, dict[str, float]] = {}
    if "reference" in arguments.only:
        comparisons |= {
            f"{arguments.reference}, {name}": value
            for name, value in reference(arguments.reference, arguments.batch_size, dtype, rounds).items()
        }
    if "peers" in arguments.only:
        found_peers = peers(arguments.batch_size, dtype, rounds)
        comparisons |= found_peers
        shares = [each["share"] for each in found_peers.values()]
        print(f"ours without MTP: {statistics.median(shares):.0%} of the measured rate of products")
    if comparisons:
        found["compared"] = comparisons
        rows = [compared(name, value) for name, value in comparisons.items()]
        print(table([["compared with", "ms, ours", "ms, theirs", "theirs / ours", "of a round"], *rows]), flush=True)
    if "decoding" in arguments.only:
        found["decoding"] = decoding()
        print(table([["decoding", ""], *([name, f"{value:.2f}"] for name, value in found["decoding"].items())]))
    if "startup" in arguments.only:
        found["startup"] = startup()
        print(table([["start-up", "CPU s"], *([name, f"{value:.2f}"] for name, value in found["startup"].items())]))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"written: {arguments.json}")
    if "others" in arguments.only:
        for name in OTHERS:
            print(f"\n{name}", flush=True)
            subprocess.run([sys.executable, str(ROOT / "benchmarks" / name)], check=False)


if __name__ == "__main__":
    main()
