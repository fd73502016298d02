"""Decoding speed of a run's model, greedy, one text: plain, with MTP guesses, and transformers with the same weights.

python benchmarks/decoding.py runs/laptop [--tokens 200] [--pairs 5] [--threads 1]

All ways take turns, pair by pair, on the same prompts, so that a busy machine slows each of them; what is shown is the
median of the ratios within pairs, and the median speed of each.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dsv3_lightning.commands.export import export
from dsv3_lightning.commands.models import load
from dsv3_lightning.inference.decode import decode
from dsv3_lightning.inference.sampling import Sampling
from dsv3_lightning.inference.speculative import speculate

PROMPTS = ("def ", "import os\n", "class Node:\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    from transformers import AutoModelForCausalLM

    model, tokenizer = load(arguments.run)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in PROMPTS]
    with tempfile.TemporaryDirectory() as folder:
        export(arguments.run, f"{folder}/out", "float32", False, 5.0)
        theirs = AutoModelForCausalLM.from_pretrained(Path(folder) / "out").eval()
        kept = drafted = 0

        def plain(prompt: list[int]) -> list[int]:
            return decode(model, [prompt], arguments.tokens, Sampling(), set(), 0)[0]

        def guessing(prompt: list[int]) -> list[int]:
            nonlocal kept, drafted
            text, counts = speculate(model, prompt, arguments.tokens, Sampling(), set(), 0, 1)
            kept, drafted = kept + counts.kept[0], drafted + counts.drafted[0]
            return text

        def transformers(prompt: list[int]) -> list[int]:
            ids = torch.tensor([prompt])
            greedy = {"max_new_tokens": arguments.tokens, "do_sample": False, "eos_token_id": [], "pad_token_id": 0}
            with torch.no_grad():
                return theirs.generate(ids, attention_mask=torch.ones_like(ids), **greedy)[0, len(prompt) :].tolist()

        ways: dict[str, Callable[[list[int]], list[int]]] = {"plain": plain}
        if model.config.mtp_depth:
            ways["with guesses"] = guessing
        ways["transformers"] = transformers
        for prompt in prompts:  # warm-up, and they agree
            texts = {name: way(prompt) for name, way in ways.items()}
            assert len({tuple(text) for text in texts.values()}) == 1, "the texts differ"
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.pairs):
            for prompt in prompts:
                for name, way in ways.items():
                    start = time.perf_counter()
                    tokens = len(way(prompt))
                    speeds[name].append(tokens / (time.perf_counter() - start))
    print("| way | token/s, median | beside plain, median of pairs |\n| --- | --- | --- |")
    for name, values in speeds.items():
        ratio = statistics.median(value / base for value, base in zip(values, speeds["plain"]))
        print(f"| {name} | {statistics.median(values):,.0f} | {ratio:.2f} |")
    if drafted:
        print(f"\nguesses kept: {kept / drafted:.1%} of {drafted}")


if __name__ == "__main__":
    main()
