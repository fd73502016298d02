"""The first stages of a preparation: what the corpus holds, and the texts that a tokenizer learns from. No torch."""

import heapq
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_lightning.data.stages.tasks import Advance, Counts, Task
from dsv3_lightning.data.text.documents import HASHES, Corpus
from dsv3_lightning.data.text.tally import ReadStats

CHECKED, CHECKED_CHARACTERS = 2000, 1000  # documents that the encoders are compared on, and what of each
CHECK, SAMPLE = "check", "sample"  # file names
SIZE = struct.Struct("<I")


class Survey(NamedTuple):
    """What a corpus holds. read: as ReadStats.facts. hashes: the least and the greatest, none without documents.

    text_bytes: by origin.
    """

    read: dict[str, Any]
    documents: int
    hashes: list[int]
    text_bytes: dict[int, int]

    @property
    def size(self) -> int:
        return sum(self.text_bytes.values())


def survey_task(task: Task, folder: Path, advance: Advance, *, corpus: Corpus, checked: int) -> Counts:
    """Reads a task's documents; writes the beginnings of `checked` of them, those of the least mixed hashes."""
    stats, least, most = ReadStats(), HASHES, -1
    sizes: Counter[int] = Counter()
    kept: list[tuple[int, str]] = []
    for document in corpus.read(task, stats):
        least, most = min(least, document.hash), max(most, document.hash)
        sizes[document.origin] += document.size
        entry = (-mixed_hash(document.hash), document.texts[0][:CHECKED_CHARACTERS])
        if len(kept) < checked:
            heapq.heappush(kept, entry)
        elif entry > kept[0]:
            heapq.heapreplace(kept, entry)
        advance(document.size)
    write_texts(folder / CHECK, (text for _, text in sorted(kept)))
    hashes = [least, most] if stats.documents else []
    return {
        "read": stats.facts(),
        "documents": stats.documents,
        "hashes": hashes,
        "text_bytes": sorted(map(list, sizes.items())),
    }


def survey_of(counts: Sequence[Counts]) -> Survey:
    """The survey of a corpus from those of its tasks."""
    sizes: Counter[int] = Counter()
    for count in counts:
        sizes.update(dict(count["text_bytes"]))
    hashes = [value for count in counts for value in count["hashes"]]
    read = added([count["read"] for count in counts])
    documents = sum(count["documents"] for count in counts)
    return Survey(read, documents, [min(hashes), max(hashes)] if hashes else [], dict(sizes))


def added(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers and mappings to numbers, added up by name."""
    total: dict[str, Any] = {}
    for fact in facts:
        for name, value in fact.items():
            if isinstance(value, Mapping):
                counter: dict[str, int] = total.setdefault(name, {})
                for key, number in value.items():
                    counter[key] = counter.get(key, 0) + number
            else:
                total[name] = total.get(name, 0) + value
    return total


def validation_threshold(hashes: Iterable[int], fraction: float) -> int:
    """The largest hash of a validation document, so that equal texts stay together; -1 for fraction 0.

    About `fraction` of the documents are at or below it. With at least two different documents, each split has one.
    hashes: of all documents, or the least and the greatest of them.
    """
    if not fraction:
        return -1
    hashes = list(hashes)
    return min(max(int(fraction * HASHES) - 1, min(hashes)), max(hashes) - 1)


def shares(text_bytes: Mapping[int, int], weights: Mapping[int, float] | None, most: int) -> dict[int, float]:
    """How much of each origin the tokenizer learns from, as a share of its text; `most` bytes in total.

    Without weights the same share of all. With weights, the origins' bytes are in their proportion, so that a small
    one of a great weight is taken several times.

    >>> shares({0: 100, 1: 300}, None, 200)
    {0: 0.5, 1: 0.5}
    >>> shares({0: 100, 1: 300}, {0: 1.0, 1: 1.0}, 1000)
    {0: 2.0, 1: 0.6666666666666666}
    """
    total = sum(text_bytes.values())
    if weights is None:
        return dict.fromkeys(text_bytes, min(1.0, most / max(total, 1)))
    size = min(most, total) / sum(weights[origin] for origin in text_bytes)
    return {origin: size * weights[origin] / max(held, 1) for origin, held in text_bytes.items()}


def sample_task(
    task: Task,
    folder: Path,
    advance: Advance,
    *,
    corpus: Corpus,
    last_validation: int,
    shares: Mapping[int, float],
) -> Counts:
    """Writes the texts of a task's training documents that the tokenizer learns from."""

    def chosen() -> Iterator[str]:
        for document in corpus.read(task):
            advance(document.size)
            whole, part = divmod(shares[document.origin], 1)
            times = int(whole) + (mixed_hash(document.hash) < part * HASHES)
            if document.hash > last_validation:
                yield from document.texts * times

    write_texts(folder / SAMPLE, chosen())
    return {}


def mixed_hash(hash: int) -> int:
    """A hash that is independent of the one that decides about the split."""
    return hash * 0x9E3779B97F4A7C15 % HASHES


def write_texts(path: Path, texts: Iterable[str]) -> None:
    with open(path, "wb") as file:
        for text in texts:
            utf8 = text.encode()
            file.write(SIZE.pack(len(utf8)) + utf8)


def read_texts(path: Path) -> Iterator[str]:
    with open(path, "rb") as file:
        while size := file.read(SIZE.size):
            yield file.read(*SIZE.unpack(size)).decode()
