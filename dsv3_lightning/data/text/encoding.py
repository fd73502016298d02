"""The stage that encodes: a task's documents to token files of both splits. Imports no torch."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv3_lightning.data.stages.tasks import Advance, Counts, Task
from dsv3_lightning.data.text.conversation import conversation
from dsv3_lightning.data.text.documents import Corpus, Document
from dsv3_lightning.data.text.encoder import Encoder
from dsv3_lightning.data.text.rewriting import Marks, Rewriting
from dsv3_lightning.data.text.store import TokenWriter

SPLITS = ("train", "validation")
BATCH = 1 << 22  # bytes of text that are encoded together
HELD_OUT = "held_out"  # a file with the bytes that bits per byte are measured on, one document after another


class EncodingPlan(NamedTuple):
    """What the documents become. last_validation: as `validation_threshold`. shard_bytes: the most in a .bin."""

    last_validation: int
    shard_bytes: int
    rewriting: Rewriting


def encode_task(
    task: Task, folder: Path, advance: Advance, *, corpus: Corpus, encoder: Encoder, plan: EncodingPlan
) -> Counts:
    """Writes both splits' shards of a task's documents, and the validation text.

    Counts documents, tokens and bytes of text by split, and by origin in each. In conversations only the assistant's
    text, on which bits per byte are measured, is counted as answers and written as validation text.
    """
    tokenizer, marks = encoder.tokenizer, Marks(encoder.tokenizer, plan.rewriting)
    writers = {
        split: TokenWriter(
            folder, split, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, plan.shard_bytes
        )
        for split in SPLITS
    }  # fmt: skip
    counts = {split: Count(corpus.origins) for split in SPLITS}
    with open(folder / HELD_OUT, "wb") as held_out:
        for batch in batches(corpus.read(task), BATCH):
            splits = [SPLITS[document.hash <= plan.last_validation] for document in batch]
            texts = [parts_of(document, split, plan.rewriting) for document, split in zip(batch, splits, strict=True)]
            words = iter(encoder.encode_batch([text for parts in texts for text in parts]))
            for document, split, parts in zip(batch, splits, texts, strict=True):
                found = [next(words) for _ in parts]
                if split == "train":
                    found = [marks.split(ids, document.hash + place) for place, ids in enumerate(found)]
                writer = writers[split]
                before = writer.tokens
                if document.roles is None:
                    writer.add(marks.filled_in(found), document.origin)
                else:
                    written = conversation(
                        tokenizer,
                        [(role, ids.tolist()) for role, ids in zip(document.roles, found, strict=True)],
                    )
                    spans = [span for span, learned in zip(written.assistant_spans, document.learned) if learned]
                    writer.add_whole(np.array(written.ids), spans, document.origin)
                counts[split].add(document, writer.tokens - before)
                if split == "validation":
                    held_out.write(document.loss_text)
            advance(sum(document.size for document in batch))
    files = {name: file for writer in writers.values() for name, file in writer.close().items()}
    return {"splits": {split: counts[split].facts() for split in SPLITS}, "files": files}


class Count:
    """Numbers of documents, tokens, and bytes of text and of answers, of a split and of each origin in it."""

    NAMES = ("documents", "tokens", "text_bytes", "answer_bytes")

    def __init__(self, origins: list[str]) -> None:
        self.origins = origins
        self.numbers = [[0, 0, 0, 0] for _ in origins]

    def add(self, document: Document, tokens: int) -> None:
        numbers = self.numbers[document.origin]
        numbers[0] += 1
        numbers[1] += tokens
        numbers[2] += document.size
        numbers[3] += len(document.loss_text)

    def facts(self) -> dict[str, Any]:
        total = [sum(numbers) for numbers in zip(*self.numbers)]
        origins = {name: dict(zip(self.NAMES, numbers)) for name, numbers in zip(self.origins, self.numbers)
                   if numbers[0]}  # fmt: skip
        return {"all": dict(zip(self.NAMES, total)), "origins": origins}


def parts_of(document: Document, split: str, rewriting: Rewriting) -> list[str]:
    """The texts of a document that are encoded one by one."""
    if document.roles is not None or split != "train":
        return document.texts
    return rewriting.parts(document.texts[0], document.hash)


def batches(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    """Yields lists of documents of at least `size` bytes in total; the last may be smaller."""
    batch: list[Document] = []
    held = 0
    for document in documents:
        batch.append(document)
        held += document.size
        if held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
