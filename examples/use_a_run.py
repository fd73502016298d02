"""A trained run from Python: load it, let it write, look at the experts that it chooses.

python examples/use_a_run.py runs/nano
"""

import sys

import torch

from dsv3_lightning import Sampling, generate, load


def main(run: str) -> tuple[str, list[list[int]]]:
    """The continuation of a prompt, and the tokens per expert of each MoE layer for it."""
    model, tokenizer = load(run)
    (text,) = generate(model, tokenizer, ["def "], max_new_tokens=32, sampling=Sampling(temperature=0.7), seed=1)
    tokens = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("def " + text)]])
    with torch.no_grad():
        losses = model.losses(tokens, torch.ones_like(tokens, dtype=torch.bool), None)
    return text, losses.counts_LE.tolist()


if __name__ == "__main__":
    text, counts = main(sys.argv[1] if len(sys.argv) > 1 else "runs/nano")
    print(f"def {text}")
    for layer, row in enumerate(counts):
        print(f"MoE layer {layer}: tokens per expert {row}")
