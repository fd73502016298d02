"""DataConfig: what is read, how it is cut, and in which order it is served. Imports no torch."""

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from dsv3_lightning.common.paths import PathText, path_text
from dsv3_lightning.common.wording import nearest
from dsv3_lightning.data.cleaning.config import CleaningConfig, Rules, check_rules
from dsv3_lightning.data.readers.kinds import Kind
from dsv3_lightning.errors import ConfigError

# What token files are made with where the settings say nothing else; folders from before these settings have them.
DEFAULTS: dict[str, Any] = {
    "shard_bytes": 1 << 28,
    "max_document_bytes": 1 << 30,
    "tokenizer_bytes": 1 << 27,
    "tokenizer_weights": None,
    "pretokenization": "v3",
}
LARGEST_VOCABULARY = 129_280  # V3's
PACKAGE = "package:"  # before the name of an installed one, among data.paths


def source_text(text: str) -> str:
    """A file or folder of texts, resolved, or package:NAME or a URL as it is."""
    return text if text.startswith(PACKAGE) or is_url(text) else path_text(text)


def is_url(text: str) -> bool:
    """Whether the text is a URL of fsspec, such as s3://bucket/folder."""
    return "://" in text


def is_pattern(text: str) -> bool:
    """Whether the text is a pattern of a file's names and no file."""
    return any(mark in text for mark in "*?[") and not Path(text).exists()


SourceText = Annotated[str, source_text]


@dataclass(frozen=True, kw_only=True)
class BatchRamp:
    """A batch that grows from `start` samples by `increment` at a time to data.batch_size, over so many tokens.

    Raises ConfigError.
    """

    start: int
    increment: int
    tokens: int

    def __post_init__(self) -> None:
        for name in ("start", "increment", "tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.batch_ramp.{name}={getattr(self, name)}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of text. Its name in data.sources is the origin of its documents, in metrics and in the report.

    Raises ConfigError.

    paths: as data.paths, and patterns such as web/*.html, and URLs of fsspec: s3, gs, hf, https, memory, ...
    kind: of its files (data/readers/kinds.py); auto: by their names.
    tokenizer: a `tokenizer.json` that Megatron's token files were made with.
    text_key: the field of a jsonl line that holds the text or the conversation; None: data.text_key.
    weight: its share of the training samples, in proportion to the other weights.
    epochs: how many passes the run makes over it, in place of a weight; beside a weight at most so many, after which
        the others share its part.
    language: the language of its documents (en, zh, ...), or code.
    filters: the set of data.cleaning.quality that judges its documents, or rules of its own; None: they aren't judged.
    license: a note for the report, such as a license's name.
    """

    paths: list[SourceText]
    kind: Kind = "auto"
    tokenizer: PathText | None = None
    text_key: str | None = None
    weight: float | None = None
    epochs: float | None = None
    language: str | None = None
    filters: str | Rules | None = None
    license: str | None = None


def check_sources(sources: dict[str, SourceConfig]) -> None:
    """Raises ConfigError with the source's name."""
    if not sources:
        raise ConfigError("data.sources={}: must name a source, as {english: {paths: [...]}}")
    for name, source in sources.items():
        where = f"data.sources.{name}"
        if not re.fullmatch(r"\w[\w-]*", name):
            raise ConfigError(f"{where}: a source's name holds letters, digits, _ and -")
        if not source.paths:
            raise ConfigError(f"{where}.paths=[]: must name a file, a folder or package:NAME")
        for key, value in (("weight", source.weight), ("epochs", source.epochs)):
            if value is not None and value <= 0:
                raise ConfigError(f"{where}.{key}={value}: must be above 0")
        if isinstance(source.filters, dict):
            check_rules(f"{where}.filters", source.filters)
    weights = {name: source.weight for name, source in sources.items() if source.epochs is None}
    if lacking := [name for name, weight in weights.items() if weight is None]:
        if len(lacking) < len(sources):
            raise ConfigError(
                f"data.sources.{lacking[0]}: has neither weight nor epochs; all sources have one of them, or none has"
            )


def check_cleaning(sources: dict[str, SourceConfig] | None, cleaning: CleaningConfig) -> None:
    """Raises ConfigError."""
    if sources is None:
        raise ConfigError("data.cleaning: needs data.sources in place of data.paths")
    for name, source in sources.items():
        if isinstance(source.filters, str) and source.filters not in cleaning.quality:
            raise ConfigError(
                f"data.sources.{name}.filters={source.filters}: no such set in data.cleaning.quality"
                f"{nearest(source.filters, cleaning.quality)}"
            )


@dataclass(frozen=True, kw_only=True)
class WeightChange:
    """New weights of some sources, from an optimizer step on or from so many tokens on; the others keep theirs.

    Raises ConfigError.
    """

    weights: dict[str, float]
    step: int | None = None
    tokens: int | None = None

    @property
    def at(self) -> int:
        return self.step if self.step is not None else self.tokens or 0


def check_schedule(schedule: list[WeightChange], sources: dict[str, SourceConfig]) -> None:
    """Raises ConfigError with the entry's place."""
    weights = {name: source.weight for name, source in sources.items() if source.weight is not None}
    for number, change in enumerate(schedule):
        where = f"data.weights_schedule[{number}]"
        if (change.step is None) == (change.tokens is None):
            raise ConfigError(f"{where}: needs either step or tokens")
        if (change.step is None) != (schedule[0].step is None):
            raise ConfigError(f"{where}: all entries need step, or all need tokens")
        for name, weight in change.weights.items():
            if name not in weights:
                raise ConfigError(f"{where}.weights.{name}: is no source with a weight; those are {' '.join(weights)}")
            if weight < 0:
                raise ConfigError(f"{where}.weights.{name}={weight}: must be at least 0")
        weights |= change.weights
        if not any(weights.values()):
            raise ConfigError(f"{where}: no source has a weight above 0")
    places = [0, *(change.at for change in schedule)]
    if any(before >= after for before, after in pairwise(places)):
        raise ConfigError(f"data.weights_schedule: is at {places[1:]}; must rise, from 1 on")


def check_tokenizer_weights(weights: dict[str, float], sources: list[str]) -> None:
    """Raises ConfigError unless each source has a weight, and one is above 0."""
    if set(weights) != set(sources):
        raise ConfigError(
            f"data.tokenizer_weights: names {' '.join(weights) or 'nothing'}; needs a weight for each of data.sources: "
            f"{' '.join(sources) or 'there are none'}"
        )
    if wrong := [name for name, weight in weights.items() if weight < 0]:
        raise ConfigError(f"data.tokenizer_weights.{wrong[0]}={weights[wrong[0]]}: must be at least 0")
    if not any(weights.values()):
        raise ConfigError("data.tokenizer_weights: no source has a weight above 0")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Text to packed samples. Raises ConfigError.

    paths: `.txt`, `.md`, `.py` and `.jsonl` files, also as `.gz` or `.zst`; folders of them; package:NAME for the
        sources of an installed package; empty: the Python interpreter's own standard-library sources.
    sources: in place of paths, several named sources; None: one corpus, of paths.
    cleaning: what happens to the documents of sources before they become tokens; None: nothing.
    text_key: the field of a jsonl line that holds the text, or a conversation as a list of {role, content} messages.
    skip_bad_lines: whether jsonl lines that can't be used are left out and counted; otherwise they are refused.
    cache_dir: prepared data lies under it, in a folder named by the hash of inputs and settings.
    tokenizer: a `tokenizer.json` to use; null trains a byte-level BPE on the training documents.
    end_token: the control token that ends a document and what the assistant says; None: the tokenizer's own.
    vocab_size: entries of the trained tokenizer, special tokens included.
    pretokenization: how the trained tokenizer cuts text before it merges: v3 (DeepSeek-V3's) or llm (DeepSeek LLM's).
    tokenizer_bytes: bytes of text that the tokenizer learns from at most.
    tokenizer_weights: the sources' shares of these, by name; None: by size.
    fim_rate: share of the training texts that are written as prefix, suffix, middle, to learn to fill in.
    split_rate: share of the training tokens of punctuation and newlines that are written as two.
    shard_bytes: the most that a file of tokens holds, unless a single document is larger.
    max_document_bytes: lines of jsonl and text files above are left out and reported.
    sequence_length: T, positions per sample; a sample holds T + 1 + mtp_depth tokens.
    packing: best_fit packs documents into samples without cutting those that fit; concatenate cuts them where a sample
        ends.
    weights_schedule: changes of the sources' weights during the run; None: they stay as they are.
    batch_size: samples per optimizer step, over all ranks and micro-batches together.
    batch_ramp: how the batch grows up to that; None: it has its size from the start.
    validation_fraction: share of the documents that is held out, by a hash of their text.
    mask_document_ends: don't train on predicting across a document's end into the next one.
    isolate_documents: tokens attend to those of their own document alone.
    seed: order of the samples.
    num_workers: loader processes per rank.
    """

    paths: list[SourceText]
    sources: dict[str, SourceConfig] | None
    cleaning: CleaningConfig | None
    text_key: str
    skip_bad_lines: bool
    cache_dir: PathText
    tokenizer: PathText | None
    end_token: str | None
    vocab_size: int
    pretokenization: Literal["v3", "llm"]
    tokenizer_bytes: int
    tokenizer_weights: dict[str, float] | None
    fim_rate: float
    split_rate: float
    shard_bytes: int
    max_document_bytes: int
    sequence_length: int
    packing: Literal["best_fit", "concatenate"]
    weights_schedule: list[WeightChange] | None
    batch_size: int
    batch_ramp: BatchRamp | None
    validation_fraction: float
    mask_document_ends: bool
    isolate_documents: bool
    seed: int
    num_workers: int

    def __post_init__(self) -> None:
        if self.sources is not None:
            if self.paths:
                raise ConfigError("data.paths and data.sources are both given; a corpus has one of them")
            check_sources(self.sources)
        if self.cleaning is not None:
            check_cleaning(self.sources, self.cleaning)
        if self.weights_schedule is not None:
            if self.sources is None or not self.is_mixed:
                raise ConfigError("data.weights_schedule: needs data.sources with weights")
            check_schedule(self.weights_schedule, self.sources)
        for name in ("sequence_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name}={getattr(self, name)}: must be at least 1")
        if (ramp := self.batch_ramp) is not None and (
            ramp.start >= self.batch_size or (self.batch_size - ramp.start) % ramp.increment
        ):
            raise ConfigError(
                f"data.batch_ramp: from start={ramp.start} by increment={ramp.increment} never reaches "
                f"data.batch_size={self.batch_size}; their difference must be a multiple of the increment"
            )
        if self.vocab_size < 300:
            raise ConfigError(f"data.vocab_size={self.vocab_size}: 256 bytes and the special tokens need at least 300")
        for name in ("tokenizer_bytes", "shard_bytes", "max_document_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name}={getattr(self, name)}: must be at least 1")
        for name in ("fim_rate", "split_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"data.{name}={getattr(self, name)}: must be in [0, 1]")
        if self.tokenizer_weights is not None:
            check_tokenizer_weights(self.tokenizer_weights, list(self.sources or ()))
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"data.validation_fraction={self.validation_fraction}: must be in [0, 1)")
        if self.isolate_documents and not self.mask_document_ends:
            raise ConfigError(
                "data.isolate_documents=true: needs data.mask_document_ends=true: no document can predict another"
            )
        if self.num_workers < 0:
            raise ConfigError(f"data.num_workers={self.num_workers}: must be at least 0")

    @property
    def setting(self) -> str:
        """The setting that names the files."""
        return "data.paths" if self.sources is None else "data.sources"

    @property
    def is_mixed(self) -> bool:
        """Whether sources have shares of the run; otherwise all documents are one corpus."""
        given = [] if self.sources is None else [(source.weight, source.epochs) for source in self.sources.values()]
        return any(pair != (None, None) for pair in given)
