"""Preparation of data: killed at random, its speed beside the bare library's, and its memory.

    python benchmarks/preparing.py kills [TIMES] [SEED]   the files after so many random kills, and of an unbroken run
    python benchmarks/preparing.py rates [MEGABYTES]      MB/s of one core in encoding, tokens/s in packed reading
    python benchmarks/preparing.py memory [MEGABYTES]     peak memory of a process of `dsv3 prepare`

The text is Python's own library, English documentation and made-up Chinese, from a fixed seed. CPU seconds of the
process are measured, so other processes on the machine matter little.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHILD = """
import sys
from dsv3_lightning.cli import main
from dsv3_lightning.data.text import documents
documents.TASK_BYTES = int(sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""
TASK_BYTES = 1 << 18


def write_corpus(folder: Path, megabytes: float) -> None:
    """Lines of jsonl: modules of the standard library and Chinese, repeated with changes up to the size."""
    rng = random.Random(0)
    library = sorted(Path(os.__file__).parent.glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in library]
    folder.mkdir()
    written = number = 0
    while written < megabytes * 1e6:
        with open(folder / f"{number:03}.jsonl", "w", encoding="utf-8") as file:
            for _ in range(400):
                text = rng.choice(texts)
                begin = rng.randrange(len(text) - 200) if len(text) > 400 else 0
                text = text[begin : begin + rng.randint(200, 8000)]
                if rng.random() < 0.3:
                    text = "".join(chr(0x4E00 + int(rng.expovariate(1 / 900)) % 0x5000) for _ in range(len(text) // 4))
                written += file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        number += 1


def command(corpus: Path, cache: Path, task_bytes: int, *more: str) -> list[str]:
    settings = [f"data.paths=[{corpus}]", f"data.cache_dir={cache}", "data.shard_bytes=300000"]
    return [sys.executable, "-c", CHILD, str(task_bytes), "prepare", "nano", *settings, *more]


def digests(cache: Path) -> dict[str, str]:
    (folder,) = (path.parent for path in cache.glob("*/manifest.json"))
    return {
        path.relative_to(cache).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def kills(times: int = 20, seed: int = 0) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "corpus", 8)
        begun = time.monotonic()
        subprocess.run(command(folder / "corpus", folder / "whole", TASK_BYTES, "--jobs", "2"), check=True,
                       capture_output=True)  # fmt: skip
        seconds, expected = time.monotonic() - begun, digests(folder / "whole")
        killed, cache = 0, folder / "killed"
        while killed < times:
            process = subprocess.Popen(
                command(folder / "corpus", cache, TASK_BYTES, "--jobs", "2"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                code = process.wait(timeout=rng.uniform(0.5, seconds * 0.6))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                killed += 1
                done = len(list(cache.glob("*.work/*/*/done.json")))
                print(f"kill {killed}: {done} tasks done", flush=True)
                continue
            assert code == 0, code
            if digests(cache) != expected:
                break
            print(f"complete after {killed} kills, identical; from the start again", flush=True)
            subprocess.run(["rm", "-r", str(cache)], check=True)
        subprocess.run(command(folder / "corpus", cache, TASK_BYTES, "--jobs", "2"), check=True, capture_output=True)
        same = digests(cache) == expected
        print(f"{len(expected)} files after {killed} kills: {'identical' if same else 'DIFFERENT'}")
        sys.exit(0 if same else 1)


def rates(megabytes: float = 60) -> None:
    os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    from dsv3_lightning.data.text.documents import Document
    from dsv3_lightning.data.text.encoder import Encoder, differs
    from dsv3_lightning.data.text.encoding import EncodingPlan, batches, encode_task
    from dsv3_lightning.data.text.rewriting import Rewriting
    from dsv3_lightning.data.text.tokenizer import Tokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "corpus", megabytes)
        lines = [line for path in sorted((folder / "corpus").iterdir()) for line in open(path, encoding="utf-8")]
        documents = [Document.of(json.loads(line)["text"], 0) for line in lines]
        size = sum(document.size for document in documents)
        tokenizer = Tokenizer.train((document.texts[0] for document in documents[::10]), 32_768)
        assert (why := differs(tokenizer, [document.texts[0] for document in documents[:500]])) is None, why
        encoder = Encoder(tokenizer, fast=True)

        class InMemory:
            origins = ["all"]

            def tasks(self) -> list[dict[str, Any]]:
                return [{}]

            def read(self, task: dict[str, Any], stats: Any = None) -> Any:
                return iter(documents)

        plan = EncodingPlan(1 << 58, 1 << 28, Rewriting(0.0, 0.0, 0))
        library, whole = [], []
        for turn in range(5):
            begun = time.process_time()
            for batch in batches(documents, 1 << 22):
                encoder.backend.encode_batch_flat([document.texts[0] for document in batch])
            library.append(size / 1e6 / (time.process_time() - begun))
            (folder / f"{turn}").mkdir()
            begun = time.process_time()
            encode_task({}, folder / f"{turn}", lambda size: None, corpus=InMemory(), encoder=encoder, plan=plan)
            whole.append(size / 1e6 / (time.process_time() - begun))
        share = max(whole) / max(library)
        print(f"fastokens alone {max(library):.1f} MB/s of one core; encoding to files {max(whole):.1f}, {share:.0%}")
        reading(folder)


def reading(folder: Path) -> None:
    import numpy as np

    from dsv3_lightning.data.batches.dataset import PackedDataset
    from dsv3_lightning.data.batches.packing import pack
    from dsv3_lightning.data.batches.sampling import Layout, TrainSampler
    from dsv3_lightning.data.text.store import FORMAT, TokenFile, TokenWriter, token_dtype, write_manifest

    for shards, shard_bytes in (("one shard", None), ("shards of 8 MiB", 1 << 23)):
        place = folder / shards
        place.mkdir()
        rng = np.random.default_rng(0)
        writer = TokenWriter(place, "train", 32_768, 0, 1, shard_bytes)
        for length in rng.lognormal(np.log(600), 1.0, 60_000).astype(int):
            writer.add(rng.integers(3, 32_768, length).astype(np.uint32))
        write_manifest(place, {"format": FORMAT, "dtype": token_dtype(32_768), "files": writer.close()})
        file = TokenFile(place, "train")
        for length in (512, 4096):
            dataset = PackedDataset(file, pack(file.offsets(), length, 1, True), length, 1, 2, True)
            found = []
            for _ in range(3):
                batches, begun = list(TrainSampler(len(dataset), Layout(8), 1, 200)), time.process_time()
                for batch in batches:
                    dataset[batch]
                found.append(200 * 8 * length / 1e6 / (time.process_time() - begun))
            print(f"{len(file.tokens) / 1e6:.0f} M tokens in {shards}, packed to {length}: {max(found):.1f} M tokens/s "
                  "of one core")  # fmt: skip


def memory(megabytes: float = 1000) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "corpus", megabytes)
        for jobs in ("1", "2"):
            given = command(folder / "corpus", folder / f"cache{jobs}", 1 << 26, "--jobs", jobs)
            more = ["model.vocab_size=32768", "data.tokenizer_bytes=100000000", "data.shard_bytes=268435456"]
            begun = time.monotonic()
            before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            subprocess.run([*given, *more], check=True, capture_output=True)
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            print(f"--jobs {jobs}: largest process {peak / 1e6:.2f} GB (at least {before / 1e6:.2f}), "
                  f"{time.monotonic() - begun:.0f} s for {megabytes:.0f} MB", flush=True)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("kills", "rates", "memory"), default="rates")
    parser.add_argument("number", nargs="?", type=int, help="kills, or megabytes")
    given = parser.parse_args()
    {"kills": kills, "rates": rates, "memory": memory}[given.what](*([] if given.number is None else [given.number]))
