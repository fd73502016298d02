"""Preparation of data: killed at random, its speed beside the bare library's, and its memory.

    python benchmarks/preparing.py kills [TIMES]        the files after so many random kills, and of an unbroken run
    python benchmarks/preparing.py rates [MEGABYTES]    MB/s of one core in encoding, tokens/s in packed reading
    python benchmarks/preparing.py memory [MEGABYTES]   peak memory of `dsv3 prepare` with cleaning
    python benchmarks/preparing.py tokenizer            peak memory of learning a tokenizer, and its time

The text is Python's own library and made-up Chinese, from a fixed seed; for `memory` and `tokenizer` the demo corpus,
which `dsv3 demo-corpus` has written into the working folder. CPU seconds of the process are measured, so other
processes on the machine matter little.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHILD = """
import re, sys
from pathlib import Path
from dsv3_lightning.cli import main
from dsv3_lightning.data.cleaning import stage
from dsv3_lightning.data.text import documents
if sys.argv[1] != "0":
    documents.TASK_BYTES = stage.TASK_BYTES = int(sys.argv[1])
code = main(sys.argv[2:])
print("peak", re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
sys.exit(code)
"""
TASK_BYTES = 1 << 18
SOURCES = ("english", "chinese", "code")


def write_corpus(folder: Path, megabytes: float, seed: int = 0) -> None:
    """Lines of jsonl: modules of the standard library and Chinese, repeated with changes up to the size."""
    rng = random.Random(seed)
    library = sorted(Path(os.__file__).parent.glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in library]
    folder.mkdir(parents=True)
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


def command(cache: Path, task_bytes: int, *settings: str) -> list[str]:
    return [sys.executable, "-c", CHILD, str(task_bytes), "prepare", *settings, f"data.cache_dir={cache}"]


def cleaned(corpus: Path, cache: Path) -> list[str]:
    """A preparation by two processes of two sources, which share documents, with all steps of cleaning."""
    languages = {"first": "null, filters: prose", "second": "code, filters: code"}
    sources = ", ".join(f"{name}: {{paths: [{corpus / name}], language: {more}}}" for name, more in languages.items())
    return command(cache, TASK_BYTES, "nano", "cleaning", "--jobs", "2", "data.shard_bytes=300000",
                   "data.cleaning.languages=null", f"data.sources={{{sources}}}")  # fmt: skip


def digests(cache: Path) -> dict[str, str]:
    """Of all files, those of the tasks of cleaning and comparing and of the tokens, but for halves of killed writes."""
    return {
        path.relative_to(cache).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(cache.rglob("*"))
        if path.is_file() and path.suffix != ".lock" and path.name != "digests.json" and "/." not in str(path)
    }


def kills(times: int = 20, seed: int = 0) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "corpus/first", 4)
        write_corpus(folder / "corpus/second/shared", 1)
        write_corpus(folder / "corpus/second/own", 1, seed=1)
        begun = time.monotonic()
        subprocess.run(cleaned(folder / "corpus", folder / "whole"), check=True, capture_output=True)
        seconds, expected = time.monotonic() - begun, digests(folder / "whole")
        killed, cache, same = 0, folder / "killed", True
        while same and (killed < times or cache.exists()):
            process = subprocess.Popen(
                cleaned(folder / "corpus", cache), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                code = process.wait(timeout=rng.uniform(2, seconds * 0.6) if killed < times else None)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                killed += 1
                done = [len(list(cache.glob(f"{stage}*/**/done.json"))) for stage in ("clean-", "join-")]
                more = len(list(cache.glob("*.work/**/done.json")))
                print(f"kill {killed}: {done[0]} tasks cleaned, {done[1]} compared, {more} others done", flush=True)
                continue
            assert code == 0, code
            found = digests(cache)
            same = found == expected
            for path in sorted(
                path for path in found.keys() | expected.keys() if found.get(path) != expected.get(path)
            ):
                print(f"{path}: {'differs' if path in found and path in expected else 'in one of the two'}")
            print(
                f"complete after {killed} kills, {'identical; from the start again' if same else 'DIFFERENT'}",
                flush=True,
            )
            if same:
                subprocess.run(["rm", "-r", str(cache)], check=True)
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


def demo_documents(source: str) -> Iterator[str]:
    from dsv3_lightning.data.text.corpus import read_documents
    from dsv3_lightning.data.text.sources import find_sources

    for text in read_documents(find_sources([f"demo_corpus/{source}"]), "text"):
        assert isinstance(text, str)
        yield text


def write_large_corpus(folder: Path, megabytes: float) -> None:
    """The demo corpus, enlarged: documents of paragraphs of the source in another order, half of it English."""
    rng = random.Random(0)
    for source in SOURCES:
        found = [part for text in demo_documents(source) for part in text.split("\n\n") if len(part) > 40]
        wanted = megabytes * 1e6 / (2 if source == "english" else 4)
        (folder / source).mkdir(parents=True)
        written = number = 0
        while written < wanted:
            with open(folder / source / f"{number:03}.jsonl", "w", encoding="utf-8") as file:
                for _ in range(2000):
                    text = "\n\n".join(rng.choice(found) for _ in range(rng.randint(3, 20)))
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                    written += len(text.encode())
            number += 1


def memory(megabytes: float = 1000) -> None:
    from dsv3_lightning.data.text.tokenizer import Tokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        some = (text for source in SOURCES for text in itertools.islice(demo_documents(source), 500))
        Tokenizer.train(some, 32_768).save(folder)
        for size in (megabytes / 10, megabytes):
            corpus, cache = folder / f"corpus{size:.0f}", folder / f"cache{size:.0f}"
            write_large_corpus(corpus, size)
            sources = [f"data.sources.{source}.paths=[{corpus / source}]" for source in SOURCES]
            more = ["data.fim_rate=0", "data.tokenizer_weights=null", f"data.tokenizer={folder / 'tokenizer.json'}"]
            begun = time.monotonic()
            given = command(cache, 0, "bilingual", "model.vocab_size=32768", *more, *sources, "--jobs", "1")
            done = subprocess.run(given, stdout=subprocess.PIPE, text=True, check=True)
            peak = int(done.stdout.split()[-1]) / 1e6
            print(f"cleaning, comparing and encoding {size:.0f} MB by one process: {peak:.2f} GB, "
                  f"{time.monotonic() - begun:.0f} s", flush=True)  # fmt: skip
            shutil.rmtree(corpus)


LEARN = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
from preparing import limited
from dsv3_lightning.data.text.tokenizer import Tokenizer
Tokenizer.train(limited(sys.argv[2], float(sys.argv[3])), int(sys.argv[4]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, time.process_time())
"""


def limited(source: str, megabytes: float) -> Iterator[str]:
    """The documents of a source, or of all in turns, up to the size."""
    left = megabytes * 1e6
    for texts in itertools.zip_longest(*map(demo_documents, SOURCES if source == "all" else [source])):
        for text in texts:
            if text is not None and left > 0:
                left -= len(text.encode())
                yield text


def tokenizer() -> None:
    os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    cases = [(source, mb, 8192) for source in SOURCES for mb in (5, 10)] + [("all", 1000, 102_400)]
    for source, mb, entries in cases:
        given = [sys.executable, "-c", LEARN, str(Path(__file__).parent), source, str(mb), str(entries)]
        peak, seconds = map(float, subprocess.run(given, check=True, stdout=subprocess.PIPE).stdout.split())
        print(f"{source}, at most {mb} MB, {entries:,} entries: {peak:.2f} GB, {seconds:.0f} s of one core", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("kills", "rates", "memory", "tokenizer"), default="rates")
    parser.add_argument("number", nargs="?", type=int, help="kills, or megabytes")
    given = parser.parse_args()
    chosen = {"kills": kills, "rates": rates, "memory": memory, "tokenizer": tokenizer}[given.what]
    chosen(*([] if given.number is None else [given.number]))
