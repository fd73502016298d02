"""Cleaning of text: MB/s per core by step beside bare libraries, memory, and whether planted faults are found.

    python benchmarks/cleaning.py english=FOLDER chinese=FOLDER code=FOLDER [--mb 20]

The folders hold anything that data.sources reads; without any, Python's own sources are the only corpus. Rates are of
UTF-8 bytes of text by the processor's time of this process, so that other load doesn't count. Near duplicates are
planted at known similarities in real documents of each source and compared with the curve of MinHash; questions of
three made-up evaluation sets, cut from held-out documents, are planted as they are and with other case and spacing.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from dsv3_lightning.common.table import table
from dsv3_lightning.common.typed import build
from dsv3_lightning.config.compose import PRESETS, read_yaml
from dsv3_lightning.data.cleaning import stage
from dsv3_lightning.data.cleaning.config import CleaningConfig
from dsv3_lightning.data.cleaning.contamination import SHORTEST, Contamination
from dsv3_lightning.data.cleaning.duplicates import digest, similar
from dsv3_lightning.data.cleaning.language import identify
from dsv3_lightning.data.cleaning.minhash import bucket_keys, match_probability, signatures
from dsv3_lightning.data.cleaning.private import EMAIL, IPV4, mask
from dsv3_lightning.data.cleaning.quality import judge
from dsv3_lightning.data.cleaning.repair import repair
from dsv3_lightning.data.cleaning.words import ngrams, words_of
from dsv3_lightning.data.config import DEFAULTS, SourceConfig
from dsv3_lightning.data.scale.dump import Dump, shown
from dsv3_lightning.data.text.corpus import read_documents
from dsv3_lightning.data.text.sources import Source, find_named

PUBLISHED = read_yaml(PRESETS / "cleaning.yaml")["data"]["cleaning"]  # type: ignore[arg-type]
FILTERS = {"english": "web_en", "chinese": "web_zh", "code": "code"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", help="NAME=FOLDER; the names english, chinese and code have their rules")
    parser.add_argument("--mb", type=float, default=20, help="of text of each source, repeated if there is less")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # a file of documents: cleans it and prints the peak
    given = parser.parse_args()
    if given.measure:
        return measure(Path(given.measure))
    paths = dict(pair.split("=", 1) for pair in given.sources) or {"code": sysconfig.get_paths()["stdlib"]}
    corpora = {name: documents(name, path) for name, path in paths.items()}
    for name, texts in corpora.items():
        print(f"{name}: {len(texts):,} documents, {size(texts) / 1e6:.1f} MB", flush=True)
    rates = {name: by_step(name, repeated(texts, given.mb), Path(paths[name])) for name, texts in corpora.items()}
    steps = list(dict.fromkeys(step for found in rates.values() for step in found))
    rows = [
        ["MB/s per core", *rates],
        *([s, *(f"{r[s]:.1f}" if s in r else "-" for r in rates.values())] for s in steps),
    ]
    print(f"\n{table(rows)}\n")
    print(table(recall(corpora)), "\n")
    print(table(contamination(corpora)), "\n")
    print(table(memory(corpora)), "\n")
    mean = {step: harmonic([found[step] for found in rates.values() if step in found]) for step in steps}
    wanted = {"html": mean.get("html (resiliparse, of HTML)"), **{step: mean.get(step) for step in DUMP_STEPS}}
    print("One dump of Common Crawl at these rates (386 TiB of HTML, 9 % of it text):")
    print(shown(Dump(), {step: rate for step, rate in wanted.items() if rate}))


DUMP_STEPS = (
    "repair",
    "language",
    "quality",
    "pii",
    "exact: digest",
    "near: words, 5-grams, signatures",
    "write jsonl.zst",
)


def documents(name: str, path: str) -> list[str]:
    kind = "code" if name == "code" else "auto"
    files = find_named(path, kind, None, f"{name}=", Path(tempfile.gettempdir()))
    found = []
    for file in files:
        ending = "html" if file.name.endswith((".html", ".htm")) else None
        found += [text for text in read_documents([file._replace(kind=ending)], "text") if isinstance(text, str)]
    return [part for text in found for part in cut(text)]


def cut(text: str, length: int = 6000) -> list[str]:
    """Parts of about so many characters, at line ends: documents of the usual size."""
    parts, part = [], ""
    for line in text.splitlines(keepends=True):
        part += line
        if len(part) >= length:
            parts, part = [*parts, part], ""
    return [part for part in [*parts, part] if len(part) > 200]


def size(texts: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def repeated(texts: list[str], mb: float) -> list[str]:
    found: list[str] = []
    total = 0
    while total < mb * 1e6:
        for text in texts:
            found.append(text)
            total += len(text.encode())
            if total >= mb * 1e6:
                break
    return found


def rate(total: int, work: Callable[[], Any], repeats: int = 2) -> float:
    """MB/s of the best of the repeats, by the processor's time."""
    best = float("inf")
    for _ in range(repeats):
        begun = time.process_time()
        work()
        best = min(best, time.process_time() - begun)
    return total / 1e6 / max(best, 1e-9)


def harmonic(rates: Sequence[float]) -> float:
    return len(rates) / sum(1 / rate for rate in rates)


def by_step(name: str, texts: list[str], path: Path) -> dict[str, float]:
    """MB/s per core of each step, and of bare libraries on the same texts."""
    total = size(texts)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "x.jsonl.zst")
        found["write jsonl.zst"] = rate(total, lambda: write(file, texts))
        found["read jsonl.zst"] = rate(total, lambda: exhaust(read_documents([Source(file.name, file)], "text")))
        found["  zstandard + json"] = rate(total, lambda: bare_read(file, json.loads))
        try:
            import orjson

            found["  zstandard + orjson"] = rate(total, lambda: bare_read(file, orjson.loads))
        except ImportError:
            pass
    if name != "code":
        found["repair"] = rate(total, lambda: [repair(text) for text in texts])
        found["language"] = rate(total, lambda: [identify(text, 0.65) for text in texts])
    rules = PUBLISHED["quality"][FILTERS.get(name, "web")]
    batches = list(in_batches(texts))
    found["quality"] = rate(total, lambda: [judge(batch, rules) for batch in batches])
    found["pii"] = rate(total, lambda: [mask(text) for text in texts])
    found["  both regular expressions"] = rate(total, lambda: [(EMAIL.search(t), IPV4.search(t)) for t in texts])
    found["exact: digest"] = rate(total, lambda: [digest(text) for text in texts])
    found["near: words, 5-grams, signatures"] = rate(total, lambda: [sign(batch) for batch in batches])
    grams = [ngrams(words_of(batch), 5) for batch in batches]
    found["  signatures alone"] = rate(total, lambda: [signatures(*gram, 112) for gram in grams])
    try:
        from rensa import RMinHash

        def bare() -> None:
            for text in texts:
                words = text.split()
                RMinHash(112, 1).update([" ".join(words[i : i + 5]) for i in range(len(words) - 4)])

        found["  rensa on words of str.split"] = rate(total, bare, 1)
    except ImportError:
        pass
    known = np.sort(np.random.default_rng(0).integers(0, 2**63, 70_000).astype(np.uint64))
    sets = Contamination({13: known}, 0, 0)
    found["decontaminate (70,000 13-grams)"] = rate(total, lambda: [sets.found(words_of(batch)) for batch in batches])
    pages = list(path.rglob("*.html"))[:200] if path.is_dir() else []
    if pages:
        from dsv3_lightning.data.readers.html import text_of

        contents = [page.read_bytes() for page in pages]
        found["html (resiliparse, of HTML)"] = rate(sum(map(len, contents)), lambda: [text_of(one) for one in contents])
    return found


def write(path: Path, texts: Sequence[str]) -> None:
    with stage.documents_writer(path) as add:
        for text in texts:
            add({"text": text})


def bare_read(path: Path, loads: Callable[[bytes], Any]) -> None:
    content = zstandard.ZstdDecompressor().stream_reader(path.open("rb")).read()
    exhaust(loads(line)["text"] for line in content.split(b"\n") if line)


def exhaust(found: Any) -> None:
    for _ in found:
        pass


def in_batches(texts: Sequence[str]) -> Any:
    return stage.batches(iter(texts))


def sign(texts: Sequence[str]) -> np.ndarray:
    return signatures(*ngrams(words_of(texts), 5), 112)


def recall(corpora: dict[str, list[str]], pairs: int = 60) -> list[list[str]]:
    """Found and expected pairs by true similarity, and how similar what was found in different documents is."""
    rng = random.Random(0)
    rows = [["near duplicates", "similarity", "pairs", "found", "by the curve"]]
    for name, texts in corpora.items():
        chosen = [text for text in dict.fromkeys(texts) if len(words_of([text]).hashes) >= 200]
        chosen = [text for text, again in zip(chosen, similar_to_earlier(chosen)) if not again]
        planted: list[tuple[str, str]] = []
        for share in (0.0, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1):
            planted += [(text, edited(text, share, rng)) for text in rng.sample(chosen, min(pairs, len(chosen)))]
        alike = np.array([jaccard(*pair) for pair in planted])
        signed = sign([text for pair in planted for text in pair])
        keys = np.stack([bucket_keys(signed, bucket, 8) for bucket in range(14)], 1)
        found = (keys[::2] == keys[1::2]).any(1)
        expected = np.array([match_probability(value, 14, 8) for value in alike])
        for low in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
            inside = (alike >= low) & (alike < low + 0.1)
            if inside.any():
                row = [f"{low:.1f}", f"{inside.sum()}", f"{found[inside].sum()}", f"{expected[inside].sum():.1f}"]
                rows.append([name, *row])
        marked = marked_pairs(list(dict.fromkeys(texts)))
        alike = np.array([jaccard(*pair) for pair in marked])
        for low in (0.0, 0.5, 0.7):
            rows.append([name, f"of {len(marked)} pairs of the corpus, above {low}", "", f"{(alike > low).sum()}", ""])
    return rows


def marked_pairs(texts: Sequence[str], most: int = 500) -> list[tuple[str, str]]:
    """Pairs of different texts that share a bucket, which is why one of them would be dropped."""
    signed = sign(texts)
    found: set[tuple[int, int]] = set()
    for bucket in range(14):
        keys = bucket_keys(signed, bucket, 8)
        order = np.argsort(keys, kind="stable")
        equal = np.flatnonzero((keys[order[1:]] == keys[order[:-1]]) & (keys[order[1:]] != 0))
        found |= set(zip(order[equal].tolist(), order[equal + 1].tolist()))
    return [(texts[a], texts[b]) for a, b in sorted(found)[:most]]


def similar_to_earlier(texts: Sequence[str]) -> np.ndarray:
    signed = sign(texts)
    return similar(lambda bucket: bucket_keys(signed, bucket, 8), 14)


def edited(text: str, share: float, rng: random.Random) -> str:
    """The text with this share of its words, or of its Chinese characters, replaced by others of it."""
    spaced = text.count(" ") > len(text) / 20
    parts = text.split(" ") if spaced else list(text)
    for place in rng.sample(range(len(parts)), int(share * len(parts))):
        parts[place] = rng.choice(parts)
    return (" " if spaced else "").join(parts)


def jaccard(one: str, other: str) -> float:
    grams, bounds = ngrams(words_of([one, other]), 5)
    a, b = set(grams[: bounds[1]].tolist()), set(grams[bounds[1] :].tolist())
    return len(a & b) / max(len(a | b), 1)


def contamination(corpora: dict[str, list[str]], count: int = 200) -> list[list[str]]:
    """Three sets of questions, planted in half of the documents as they are or rephrased in case and spacing."""
    rng = random.Random(1)
    rows = [["decontamination", "planted", "too short", "found", "clean documents", "lost"]]
    with tempfile.TemporaryDirectory() as folder:
        questions: dict[str, list[str]] = {}
        hosts: dict[str, list[str]] = {}
        for name, texts in corpora.items():
            unique = list(dict.fromkeys(texts))
            rng.shuffle(unique)
            half = len(unique) // 2
            questions[name] = [question(text) for text in unique[:half]][:count]
            hosts[name] = unique[half:][: 2 * count]
            lines = (json.dumps({"question": text}) for text in questions[name])
            Path(folder, f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        sets = Contamination.of_files([str(path) for path in sorted(Path(folder).iterdir())], 13, 24)
    for name, texts in hosts.items():
        already = sets.found(words_of(texts))  # text that documents share, such as licenses
        clean = [text for text, hit in zip(texts, already) if not hit]
        planted = []
        for number, text in enumerate(questions[name]):
            changed = [text, text.upper(), "  \n".join(text.split(" ")), text.lower().replace(" ", "\t")][number % 4]
            host = clean[number % len(clean)]
            planted.append(f"{host[:300]}\n{changed}\n{host[300:600]}")
        hits = sets.found(words_of(planted))
        lost = sets.found(words_of(clean))
        short = sum(len(words_of([text]).hashes) < SHORTEST for text in questions[name])
        row = [f"{len(planted)}", f"{short}", f"{int(hits.sum())}", f"{len(clean)}", f"{int(lost.sum())}"]
        rows.append([name, *row])
    return rows


def question(text: str) -> str:
    """A piece of 40 words or characters from the middle."""
    middle = text[len(text) // 2 :]
    words = middle.split()
    return " ".join(words[1:41]) if len(words) > 60 else middle[:80]


def memory(corpora: dict[str, list[str]]) -> list[list[str]]:
    """The peak of a process that cleans one task, for two sizes of its input."""
    texts = [text for found in corpora.values() for text in found]
    rows = [["memory of a task", "text", "peak"]]
    with tempfile.TemporaryDirectory() as folder:
        for mb in (10, 100):
            path = Path(folder, f"{mb}.jsonl.zst")
            write(path, repeated(texts, mb))
            command = [sys.executable, __file__, "--measure", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(["clean", f"{mb} MB", f"{int(done.stdout) / 1e6:.0f} MB"])
    return rows


def measure(path: Path) -> None:
    cleaning = build(CleaningConfig, PUBLISHED)
    work = stage.CleanWork(
        SourceConfig(paths=[str(path)], filters="web"),
        cleaning,
        "text",
        False,
        DEFAULTS["max_document_bytes"],
        [Source(path.name, path)],
    )
    with tempfile.TemporaryDirectory() as folder:
        stage.clean_task(
            work, False, {"files": [[0, path.name, path.stat().st_size, ""]]}, Path(folder), lambda size: None
        )
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss counts the parent's memory at the fork
        (peak,) = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        print(int(peak) * 1024)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


if __name__ == "__main__":
    main()
