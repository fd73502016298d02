"""Attention of documents that do not see each other: with a mask of [B, 1, T, T], and a call for each document.

python benchmarks/documents.py

Forward and backward pass of one layer's attention in fp32, 4 heads of widths 48 and 32 (`laptop`), on one thread.
Each case runs in its own process. Times are CPU times, so that other work on the machine matters little. Memory is the
process's peak minus what it had before the pass. Lengths of documents are log-normal with a median of 600 tokens, as in
web text, and end with the sample. Linux only.
"""

import argparse
import math
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_lightning.model.attention_kernels import causal_attention, find_documents

LENGTHS = (2048, 4096, 8192, 16384, 32768)
HEADS, QK, V = 4, 48, 32


def documents_of(T: int) -> Tensor:
    """The number of each token's document, int64 [1, T]."""
    generator = torch.Generator().manual_seed(T)
    lengths = (torch.randn(T, generator=generator) + math.log(600)).exp().long().clamp(min=1)
    return torch.repeat_interleave(torch.arange(T), lengths)[None, :T]


def with_mask(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    T = documents.shape[1]
    earlier = torch.ones(T, T, dtype=torch.bool).tril()
    mask = (documents[:, None, :, None] == documents[:, None, None, :]) & earlier
    v = F.pad(v, (0, QK - V))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=0.1)[..., :V]


def by_document(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    return causal_attention(q, k, v, 0.1, find_documents(documents, q.device))


def causal(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    return causal_attention(q, k, v, 0.1)


CASES = {"mask": with_mask, "documents": by_document, "causal": causal}


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def measure(case: str, T: int) -> None:
    """Prints the seconds of a forward and backward pass, and its peak memory in bytes."""
    torch.set_num_threads(1)
    documents = documents_of(T)
    inputs = [torch.randn(1, HEADS, T, C, requires_grad=True) for C in (QK, QK, V)]

    def once() -> None:
        CASES[case](*inputs, documents).sum().backward()

    warm = [torch.randn(1, HEADS, 64, C, requires_grad=True) for C in (QK, QK, V)]
    CASES[case](*warm, documents_of(64)).sum().backward()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = status("VmRSS")
    once()
    peak = status("VmHWM") - before
    repeats = max(1, 8192 // T)
    begin = time.process_time()
    for _ in range(repeats):
        once()
    print((time.process_time() - begin) / repeats, peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="T", help="tokens of a sample")
    parser.add_argument("--case", choices=CASES, help="measure only this one, at the first length, in this process")
    arguments = parser.parse_args()
    if arguments.case:
        measure(arguments.case, arguments.lengths[0])
        return
    print("| T | documents | mask | a call each | without documents |\n| --- | --- | --- | --- | --- |")
    for T in arguments.lengths:
        cells = []
        for case in CASES:
            command = [sys.executable, __file__, "--case", case, "--lengths", str(T)]
            done = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            cells.append(f"{float(done[0]) * 1000:,.1f} ms, {int(done[1]) / 2**20:,.1f} MiB")
        count = int(documents_of(T).diff().count_nonzero()) + 1
        print(f"| {T:,} | {count} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
