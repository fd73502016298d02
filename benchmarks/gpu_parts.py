"""Times of the parts of a training step on one GPU, next to the plan's, for a slice of V2-Lite.

    python -m benchmarks.gpu_parts [--layers 4] [--samples 3] [--length 4096] [--rounds 10] [--json FILE]

The slice has V2-Lite's widths and vocabulary, its dense layer, and MoE layers with all of their experts. Parts are
timed alone, forward and backward, by CUDA events, as the median of the rounds; the row before the last is what a whole
step takes beyond them. Attention is also timed by each of torch's kernels, with values padded to the width of the keys
and without. On a CPU the same code runs at small sizes.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from dsv3_lightning.common.table import table
from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import Config, check
from dsv3_lightning.model.attention_kernels import causal_attention
from dsv3_lightning.model.moe import MoE
from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.parallel.mesh import MeshShape, StrategyConfig
from dsv3_lightning.planning.hardware import Hardware, gpu_of_device
from dsv3_lightning.planning.layout import Layout, Work, now
from dsv3_lightning.planning.step import step as planned_step
from dsv3_lightning.training.clock import Clock
from dsv3_lightning.training.optimizer import build_optimizer

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
ROW = {  # the rows of the table, and the plan's parts that each of them measures
    "attention": ("attention",),
    "routed experts": ("routed experts",),
    "output head and loss": ("output head and loss",),
    "optimizer": ("optimizer",),
}


def milliseconds(work: Callable[[], object], rounds: int) -> float:
    """The median time of a call, after two for warming up."""
    clock, times = Clock(DEVICE), []
    for number in range(rounds + 2):
        start = clock.now()
        work()
        end = clock.now()
        clock.wait()
        times += [clock.seconds(start, end) * 1e3] if number >= 2 else []
    return statistics.median(times)


def forward_and_backward(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], None]:
    """A call of the function that also computes the gradients of its inputs and parameters."""

    def work() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            out = function(*inputs)
        out.backward(torch.ones_like(out))

    return work


def kernels(config: Config, samples: int, length: int, rounds: int) -> list[tuple[str, str, float, float]]:
    """Kernel, widths, milliseconds forward and of both passes; a kernel that refuses the widths has no row."""
    model, found = config.model, []
    for width in (model.v_head_dim, model.qk_head_dim):
        shape = (samples, model.num_attention_heads, length)
        q, k = (torch.randn(*shape, model.qk_head_dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        v = pad(
            torch.randn(*shape, model.v_head_dim, device=DEVICE, dtype=torch.bfloat16), (0, width - model.v_head_dim)
        )
        inputs = [x.requires_grad_() for x in (q, k, v)]
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            forward = lambda: scaled_dot_product_attention(*inputs, is_causal=True)  # noqa: B023, E731
            try:
                with sdpa_kernel(backend):
                    alone = milliseconds(forward, rounds)
                    both = milliseconds(lambda: forward().sum().backward(), rounds)  # noqa: B023
            except RuntimeError:  # torch's way to say that the kernel doesn't take these inputs
                continue
            found.append((backend.name.lower(), f"{model.qk_head_dim} and {width}", alone, both))
    return found


def parts(config: Config, samples: int, length: int, rounds: int) -> dict[str, float]:
    """Milliseconds of a step by part."""
    model, tokens = config.model, samples * length
    with DEVICE:
        whole = Transformer(model, config.compute.activation_checkpointing)
    whole.init_weights(1)
    optimizer = build_optimizer(whole, config.optimizer)
    ids = torch.randint(model.vocab_size, (samples, length + 1), device=DEVICE)
    mask = torch.ones_like(ids, dtype=torch.bool)

    def passes() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            losses = whole.losses(ids, mask, ids[:, None, 1:])
        (losses.nll_P.sum() / tokens).backward()

    def step() -> None:
        passes()
        optimizer.step()
        optimizer.zero_grad()

    found = {"whole step": milliseconds(step, rounds)}
    passes()
    found["optimizer"] = milliseconds(optimizer.step, rounds)
    optimizer.zero_grad()

    heads = (samples, model.num_attention_heads, length)
    half = torch.bfloat16 if CUDA else torch.float32
    q, k, v = (
        torch.randn(*heads, width, device=DEVICE, dtype=half, requires_grad=True)
        for width in (model.qk_head_dim, model.qk_head_dim, model.v_head_dim)
    )
    attention = forward_and_backward(lambda q, k, v: causal_attention(q, k, v, model.qk_head_dim**-0.5), q, k, v)
    found["attention"] = milliseconds(attention, rounds) * model.num_hidden_layers

    layers = [module for module in whole.modules() if isinstance(module, MoE)]
    rows = tokens * model.num_experts_per_tok
    even_E = torch.full((model.n_routed_experts,), rows // model.n_routed_experts, device=DEVICE)
    x_RD = torch.randn(int(even_E.sum()), model.hidden_size, device=DEVICE, dtype=half, requires_grad=True)
    experts = forward_and_backward(lambda x: layers[0].experts(x, even_E.cumsum(0)), x_RD)
    found["routed experts"] = milliseconds(experts, rounds) * len(layers)

    h_BTD = torch.randn(samples, length, model.hidden_size, device=DEVICE, requires_grad=True)
    head = forward_and_backward(lambda h: whole.lm_head.loss([h], ids[:, None, 1:]), h_BTD)
    found["output head and loss"] = milliseconds(head, rounds)
    return found


def planned(config: Config, samples: int, length: int) -> dict[str, float] | None:
    """The plan's milliseconds by the same rows; None where the GPU's data sheet isn't known."""
    gpu = gpu_of_device(torch.cuda.get_device_name()) if CUDA else None
    if gpu is None or gpu.generation is None:
        return None
    hardware = Hardware(gpu)
    work = Work(samples * length, 1, length, "bf16-mixed", config.compute.activation_checkpointing)
    mesh = MeshShape(1, 1)
    layout = Layout(mesh, StrategyConfig(kind="fsdp2"), work, now(hardware.generation, mesh))
    plan = planned_step(config.model, hardware, layout)
    each = {exposed.part.name: exposed.seconds * 1e3 for exposed in plan.exposed}
    found = {row: sum(each.get(name, 0.0) for name in names) for row, names in ROW.items()}
    return found | {"whole step": plan.seconds * 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting of the slice")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    words = [f"model.num_hidden_layers={arguments.layers}", "compute.activation_checkpointing=selective"]
    config = check(compose(["v2-lite"], [*words, *arguments.set]).tree)
    measured = parts(config, arguments.samples, arguments.length, arguments.rounds)
    plan = planned(config, arguments.samples, arguments.length)
    for times in (measured, plan):
        if times is not None:
            times["everything else"] = times["whole step"] - sum(times[row] for row in ROW)
    rows = [("ms per step", "measured", "planned")]
    rows += [
        (row, f"{measured[row]:.2f}", "-" if plan is None else f"{plan[row]:.2f}")
        for row in (*ROW, "everything else", "whole step")
    ]
    where = torch.cuda.get_device_name() if CUDA else "CPU"
    print(f"V2-Lite, {arguments.layers} layers, {arguments.samples} samples of {arguments.length} tokens, on {where}")
    print(table(rows))
    found = kernels(config, arguments.samples, arguments.length, arguments.rounds) if CUDA else []
    if found:
        head = ("attention by", "widths", "ms forward", "ms forward and backward")
        print(table([head, *((name, widths, f"{a:.2f}", f"{b:.2f}") for name, widths, a, b in found)]))
    if arguments.json:
        figures = {"device": where, "measured": measured, "planned": plan, "kernels": found}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
