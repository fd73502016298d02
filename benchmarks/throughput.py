"""Training speed on the `laptop` shape, compared with transformers' DeepseekV3 in one run.

    python benchmarks/throughput.py [--rounds 8] [--batch-size 16] [--threads 2]

A step is forward, backward and a fused AdamW step on new random tokens; MTP is off, so both do the same work. Each side
may use any precision (fp32, bf16 autocast) and transformers any `experts_implementation`; the fastest of each is chosen
first. Then rounds of (ours, matrix products, theirs) alternate, so a drift of the machine's speed affects all alike.
Printed are medians: tokens/s, model FLOP/s as a share of the measured rate of matrix products in the same precision,
and the ratio of the two speeds.
"""

import argparse
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.planning.flops import training_flop_per_token
from dsv3_lightning.training.precision import measure_gemm

CPU = torch.device("cpu")
BATCHES = 16  # as in training, the numbers of tokens per expert differ from step to step
DTYPES = {"fp32": torch.float32, "bf16 autocast": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = check(compose(["laptop"], ["model.num_nextn_predict_layers=0"]).tree)
    model, T = config.model, config.data.sequence_length
    tokens = torch.randint(model.vocab_size, (BATCHES, arguments.batch_size, T + 1))
    flop = training_flop_per_token(model, T) * arguments.batch_size * T

    ours = fastest({f"ours, {name}": (our_step(model, tokens, dtype), dtype) for name, dtype in DTYPES.items()})
    theirs = fastest(
        {
            f"transformers, {implementation}, {name}": (their_step(model, tokens, dtype, implementation), dtype)
            for implementation in ("eager", "batched_mm", "grouped_mm")
            for name, dtype in DTYPES.items()
        }
    )
    rows: dict[str, list[float]] = {"ours": [], "theirs": [], "our peak": [], "their peak": [], "ratio": []}
    for _ in range(arguments.rounds):
        rows["ours"].append(seconds(ours.step))
        rows["our peak"].append(measure_gemm(ours.dtype, CPU))
        rows["their peak"].append(
            rows["our peak"][-1] if ours.dtype == theirs.dtype else measure_gemm(theirs.dtype, CPU)
        )
        rows["theirs"].append(seconds(theirs.step))
        rows["ratio"].append(rows["theirs"][-1] / rows["ours"][-1])
    middle = {name: statistics.median(values) for name, values in rows.items()}
    for side, times, peak in ((ours, "ours", "our peak"), (theirs, "theirs", "their peak")):
        rate = flop / middle[times]
        print(
            f"{side.name}: {arguments.batch_size * T / middle[times]:,.0f} tokens/s, {rate / 1e9:.0f} GFLOP/s, "
            f"{rate / middle[peak]:.0%} of {middle[peak] / 1e9:.0f} GFLOP/s"
        )
    spread = f"{min(rows['ratio']):.2f} to {max(rows['ratio']):.2f}"
    print(f"ours / transformers: {middle['ratio']:.2f} (median of {arguments.rounds} rounds, {spread})")


@dataclasses.dataclass
class Side:
    name: str
    step: Callable[[], None]
    dtype: torch.dtype


def fastest(candidates: dict[str, tuple[Callable[[], None], torch.dtype]]) -> Side:
    """The candidate with the lowest median of three steps, after two warm-up steps."""
    timed = []
    for name, (step, dtype) in candidates.items():
        step()
        first = seconds(step)
        time_of_step = first if first > 20 else statistics.median(seconds(step) for _ in range(3))
        print(f"  {name}: {time_of_step:.3f} s per step", flush=True)
        timed.append((time_of_step, name, step, dtype))
    _, name, step, dtype = min(timed, key=lambda entry: entry[0])
    return Side(name, step, dtype)


def seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def our_step(config: ModelConfig, tokens: torch.Tensor, dtype: torch.dtype) -> Callable[[], None]:
    model = Transformer(config)
    model.init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batches = itertools.cycle(tokens)

    def step() -> None:
        tokens = next(batches)
        mask, targets = torch.ones_like(tokens, dtype=torch.bool), tokens[:, None, 1:]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            losses = model.losses(tokens, mask, targets)
            loss = losses.nll_P.sum() / targets.numel() + 1e-4 * losses.balance["sequence"].sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def their_step(
    config: ModelConfig, tokens: torch.Tensor, dtype: torch.dtype, implementation: str
) -> Callable[[], None]:
    shape = {
        k: v for k, v in dataclasses.asdict(config).items() if k not in ("rope_scaling", "scoring_func", "topk_method")
    }
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM._from_config(
        DeepseekV3Config(**shape | {"num_key_value_heads": config.num_attention_heads}),
        attn_implementation="sdpa",
        experts_implementation=implementation,
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batches = itertools.cycle(tokens)

    def step() -> None:
        tokens = next(batches)
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(inputs, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
