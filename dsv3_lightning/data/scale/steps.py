"""Our steps of cleaning in the form of datatrove's: callables of (data, rank, world_size). Rank n does task n.

The tasks and their files are those of `dsv3 prepare`, so that what ranks have cleaned is cleaned for it too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_lightning.common.files import whole
from dsv3_lightning.data.cleaning.corpus import Plan, source_folder
from dsv3_lightning.data.cleaning.join import Part, documents_of, part_name
from dsv3_lightning.data.cleaning.minhash import EMPTY
from dsv3_lightning.data.cleaning.stage import clean_task, documents_writer, written
from dsv3_lightning.data.extras import needed
from dsv3_lightning.data.stages.tasks import check_list, perform, task_folder
from dsv3_lightning.data.text.corpus import read_documents
from dsv3_lightning.errors import ConfigError, RunStopped

BY = "scaling out"


def ranks(plan: Plan) -> list[tuple[str, int]]:
    """The task of each rank, as a source's name and the number of its task."""
    return [(name, number) for name, source in plan.sources.items() for number in range(len(source.tasks))]


def task_of(plan: Plan, rank: int, world_size: int) -> tuple[str, int, Path]:
    """Source, number and folder of a rank's task. Raises ConfigError for another number of ranks than of tasks.

    With another number datatrove would take ranks that it has marked as completed for others, and lose their documents.
    """
    tasks = ranks(plan)
    if world_size != len(tasks):
        raise ConfigError(f"tasks={world_size}: these files make {len(tasks)} tasks; the executor needs as many")
    name, number = tasks[rank]
    return name, number, source_folder(plan, name)


@dataclass(frozen=True)
class Clean:
    """Does the first stage of cleaning for a rank's task, unless it is done."""

    plan: Plan

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        name, number, folder = task_of(self.plan, rank, world_size)
        folder.mkdir(parents=True, exist_ok=True)
        source = self.plan.sources[name]
        check_list(folder, source.tasks)
        work = partial(clean_task, source.work, False)
        if perform(folder, number, source.tasks[number], work, lambda size: None) is None:
            raise RunStopped(f"{folder}: another process is at work on task {number}")


@dataclass(frozen=True)
class WriteSignatures:
    """Writes a rank's signatures as datatrove's stage 2 reads them, in the place of its stage 1.

    bucket_BBB/RRRRR.minhash.sig: sorted records of `rows` uint64 and the number of the document as uint32. Documents
    that are too short for n-grams have their digest in place of a signature, so that equal ones are found.
    """

    plan: Plan
    output: Path

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        _, number, folder = task_of(self.plan, rank, world_size)
        near = self.plan.cleaning.near
        assert near is not None
        signatures = np.load(task_folder(folder, number) / "signatures.npy")
        digests = np.load(task_folder(folder, number) / "digests.npy")
        for bucket in range(near.buckets):
            values = signatures[:, bucket * near.rows : (bucket + 1) * near.rows]
            content = records(values, digests, bucket).tobytes()
            with whole(self.output / f"bucket_{bucket:03d}" / f"{rank:05d}.minhash.sig") as beside:
                beside.write_bytes(content)


def records(values: np.ndarray, digests: np.ndarray, bucket: int) -> np.ndarray:
    """The sorted records of a bucket. values: uint32 [documents, rows]; digests: uint64 [documents, 2]."""
    fields = [(f"value{row}", "<u8") for row in range(values.shape[1])]
    found = np.empty(len(values), np.dtype([*fields, ("document", "<u4")]))
    empty = (values == EMPTY).all(1)
    for row, (name, _) in enumerate(fields):  # digests are shifted below datatrove's largest value, 2^61 - 1
        found[name] = np.where(empty, digests[:, row % 2] >> np.uint64(4), values[:, row].astype(np.uint64))
    found["document"] = np.arange(len(values))
    return np.sort(found, order=[name for name, _ in fields] + ["document"])


@dataclass(frozen=True)
class KeepFirst:
    """Of each cluster the first document stays, as in `dsv3 prepare`, not the one that datatrove's stage 3 keeps.

    removed: that stage's output: RRRRRR.clusters, pairs of a document's number in its rank and its cluster, uint32, and
    RRRRRR.remove, the numbers of the documents that are dropped.
    """

    removed: Path

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        known = np.zeros(0, bool)  # clusters whose first document was in an earlier rank
        for path in sorted(self.removed.glob("*.clusters")):
            documents, clusters = np.fromfile(path, "<u4").reshape(-1, 2).T  # by number
            known = np.concatenate([known, np.zeros(max(0, int(clusters.max()) + 1 - len(known)), bool)])
            first = np.zeros(len(documents), bool)
            first[np.unique(clusters, return_index=True)[1]] = True
            fall_out = documents[~first | known[clusters]]
            known[clusters] = True
            with whole(path.with_suffix(".remove")) as beside:
                beside.write_bytes(fall_out.tobytes())


@dataclass(frozen=True)
class ReadKept:
    """Yields a rank's cleaned documents, with their source, as datatrove's documents."""

    plan: Plan

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        document = needed("datatrove.data", BY).Document
        name, number, folder = task_of(self.plan, rank, world_size)
        part = Part(name, part_name(name, number), task_folder(folder, number))
        for place, found in enumerate(read_documents([documents_of(part)], "text")):
            text = found if isinstance(found, str) else "\n".join(message.text for message in found)
            metadata = {"source": name, **({} if isinstance(found, str) else {"messages": written(found)})}
            yield document(text=text, id=f"{part.name}/{place}", metadata=metadata)


@dataclass(frozen=True)
class WriteKept:
    """Writes what is left of a rank's documents: SOURCE/RRRRR.jsonl.zst, which `data.sources` reads, per rank."""

    output: Path

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        documents = list(data)
        for name in sorted({document.metadata["source"] for document in documents}):
            with whole(self.output / name / f"{rank:05d}.jsonl.zst") as beside, documents_writer(beside) as write:
                for document in documents:
                    write({"text": document.metadata.get("messages", document.text)})
        return iter(documents)
