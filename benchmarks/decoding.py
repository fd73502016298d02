"""Decoding speed of a run's model, one text: plain, by the layers for batches, with MTP drafts, and transformers.

python benchmarks/decoding.py runs/laptop [--tokens 100] [--pairs 5] [--threads 1] [--temperature 0]

All have the same weights; int8 rounds them. With one thread, time is CPU time, so waiting for other processes doesn't
count; with more it is wall-clock time. All ways take turns, pair by pair, on the same prompts. Printed are the median
speed of each way and the median of the ratios within pairs, then the cost of a draft and of the pass that verifies two
tokens, in passes of one token: drafting saves time if a round produces more tokens than it costs passes.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch

from dsv3_lightning.commands import export
from dsv3_lightning.inference.decode import decode
from dsv3_lightning.inference.decoder import Decoder
from dsv3_lightning.inference.sampling import Sampling
from dsv3_lightning.inference.single import fits
from dsv3_lightning.inference.speculative import speculate
from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.runs.models import load

PROMPTS = ("def ", "import os\n", "class Node:\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0)
    arguments = parser.parse_args()
    sampling = Sampling(arguments.temperature)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    torch.set_num_threads(arguments.threads)
    from transformers import AutoModelForCausalLM

    model, tokenizer = load(arguments.run)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in PROMPTS]
    with tempfile.TemporaryDirectory() as folder:
        export.run(Path(arguments.run), Path(folder) / "out", "float32", False, 5.0)
        theirs = AutoModelForCausalLM.from_pretrained(Path(folder) / "out").eval()
        accepted = drafted = 0

        def plain(prompt: list[int]) -> list[int]:
            return decode(model, [prompt], arguments.tokens, sampling, set(), 0)[0]

        def by_layers(prompt: list[int]) -> list[int]:
            with patch("dsv3_lightning.inference.decoder.fits", return_value=False):
                return plain(prompt)

        def int8(prompt: list[int]) -> list[int]:
            return decode(model, [prompt], arguments.tokens, sampling, set(), 0, weights="int8")[0]

        def drafting(prompt: list[int]) -> list[int]:
            nonlocal accepted, drafted
            text, counts = speculate(model, prompt, arguments.tokens, sampling, set(), 0, 1)
            accepted, drafted = accepted + counts.accepted[0], drafted + counts.drafted[0]
            return text

        def transformers(prompt: list[int]) -> list[int]:
            ids = torch.tensor([prompt])
            how = {"max_new_tokens": arguments.tokens, "eos_token_id": [], "pad_token_id": 0, "do_sample": False}
            if arguments.temperature:
                how |= {"do_sample": True, "temperature": arguments.temperature, "top_k": 0}
            with torch.no_grad():
                return theirs.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, len(prompt) :].tolist()

        ways: dict[str, Callable[[list[int]], list[int]]] = {"plain": plain, "by the layers for batches": by_layers}
        if fits(model):
            ways["int8"] = int8
        if model.config.mtp_depth:
            ways["with drafts"] = drafting
        ways["transformers"] = transformers
        for prompt in prompts:  # warm-up, and they agree
            texts = {name: way(prompt) for name, way in ways.items()}
            assert arguments.temperature or len({tuple(text) for name, text in texts.items() if name != "int8"}) == 1, (
                "the texts differ"
            )
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.pairs):
            for prompt in prompts:
                for name, way in ways.items():
                    start = clock()
                    tokens = len(way(prompt))
                    speeds[name].append(tokens / (clock() - start))
    print("| way | token/s, median | against plain, median of pairs |\n| --- | --- | --- |")
    for name, values in speeds.items():
        ratio = statistics.median(value / base for value, base in zip(values, speeds["plain"]))
        print(f"| {name} | {statistics.median(values):,.0f} | {ratio:.2f} |")
    if drafted:
        _, draft, two = costs(model, prompts[0], clock)
        share = accepted / drafted
        print(f"\ndrafts accepted: {share:.1%} of {drafted}; a round gives {1 + share:.2f} tokens")
        print(f"and costs {two:.2f} passes for two tokens at once and {draft:.2f} for the draft")


@torch.inference_mode()
def costs(model: Transformer, prompt: list[int], clock: Callable[[], float]) -> tuple[float, float, float]:
    """Seconds of a pass of one token with logits, then costs of a draft and of a pass of two tokens, in passes of one
    token: medians of 100."""
    decoder = Decoder(model, 1, len(prompt) + 4, 1)
    h_1TD, last = decoder.extend(torch.tensor([prompt])), torch.tensor([prompt[-1:]])
    decoder.extend_mtp(1, h_1TD, torch.tensor([[*prompt[1:], prompt[-1]]]), only_last=True)

    def verify(tokens: int) -> None:
        new = torch.randint(model.config.vocab_size, (1, tokens))  # other experts each time, as in a text
        decoder.logits(decoder.extend(new)).argmax(-1).tolist()
        decoder.lengths[0] -= tokens

    def draft() -> None:
        h_11D = decoder.extend_mtp(1, h_1TD[:, -1:], last, only_last=True)
        decoder.logits(h_11D, 1).argmax(-1).tolist()
        decoder.mtp_lengths[0][0] -= 1

    times: list[list[float]] = [[], [], []]
    for _ in range(100):
        for taken, work in zip(times, (lambda: verify(1), draft, lambda: verify(2))):
            start = clock()
            work()
            taken.append(clock() - start)
    one, of_draft, two = map(statistics.median, times)
    return one, of_draft / one, two / one


if __name__ == "__main__":
    main()
