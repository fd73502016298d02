"""Preparation of a corpus of any size in stages of resumable tasks. Imports no torch.

WORK/survey     how many documents and bytes there are, and the hashes that decide about the split
WORK/sample     the texts that the tokenizer learns from, and WORK/tokenizer: the tokenizer
WORK/encoding   both splits' tokens, by tasks
WORK/shards     the same, put together to shards
"""

import functools
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_lightning.common.files import FileRecord, blocks, link_or_copy, remove, utf8_path
from dsv3_lightning.data.config import DataConfig
from dsv3_lightning.data.stages.tasks import ALL, Advance, Counts, Shard, Task, Work, run_tasks, task_folder
from dsv3_lightning.data.text.documents import Corpus
from dsv3_lightning.data.text.encoder import Encoder, best_encoder
from dsv3_lightning.data.text.encoding import HELD_OUT, SPLITS, EncodingPlan, encode_task
from dsv3_lightning.data.text.merging import merge_task, merge_tasks
from dsv3_lightning.data.text.progress import progress
from dsv3_lightning.data.text.rewriting import Marks, Rewriting
from dsv3_lightning.data.text.store import FORMAT, token_dtype, write_manifest
from dsv3_lightning.data.text.survey import (
    CHECK,
    CHECKED,
    SAMPLE,
    Survey,
    added,
    read_texts,
    sample_task,
    shares,
    survey_of,
    survey_task,
    validation_threshold,
)
from dsv3_lightning.data.text.tally import notes
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError, RunStopped


class Encoded(NamedTuple):
    """What the stages have done. counts: of the encoding's tasks. merged: of those that make the shards."""

    survey: Survey
    encoder: Encoder
    counts: list[Counts]
    merged: list[Counts]


class Build:
    """The preparation of a corpus in a work folder, by one of the jobs that share it.

    tokenizer: None trains one. jobs: processes of this one. Raises ConfigError without text.
    """

    def __init__(
        self,
        work: Path,
        config: DataConfig,
        corpus: Corpus,
        tokenizer: Tokenizer | None,
        jobs: int = 1,
        shard: Shard = ALL,
    ) -> None:
        self.work, self.config, self.corpus, self.given = work, config, corpus, tokenizer
        self.jobs, self.shard = jobs, shard
        self.rewriting = Rewriting(config.fim_rate, config.split_rate, config.seed)
        if tokenizer is not None:
            Marks(tokenizer, self.rewriting)  # refuses one without the tokens to fill in with

    def stage(
        self, name: str, tasks: list[Task], work: Work, label: str, total: int | None, take_over: bool = True
    ) -> list[Counts]:
        """What each task counted. Raises RunStopped with code 0 if other jobs have tasks left to do."""
        with progress(label, total) as advance:
            counts = run_tasks(
                self.work / name, tasks, work, self.jobs, self.shard, take_over=take_over, advance=advance
            )
        if counts is None:
            raise others_have_work(label, self.shard)
        return counts

    def encode(self, files_read: int) -> "Encoded":
        """Does all stages, or this job's part of them."""
        tasks = self.corpus.tasks()
        survey = self.survey(tasks, files_read)
        last_validation = validation_threshold(survey.hashes, self.config.validation_fraction)
        tokenizer = self.given or self.train_tokenizer(tasks, survey, last_validation)
        checks = (text for number in range(len(tasks)) for text in read_texts(self.of("survey", number) / CHECK))
        encoder = best_encoder(tokenizer, checks, survey.size)
        plan = EncodingPlan(last_validation, self.config.shard_bytes, self.rewriting)
        work = functools.partial(encode_task, corpus=self.corpus, encoder=encoder, plan=plan)
        encoded = self.stage("encoding", tasks, work, "encoding", survey.size)
        merge = functools.partial(
            merge_task, encoded=self.work / "encoding", dtype=token_dtype(tokenizer.vocab_size)
        )  # fmt: skip
        merged = run_tasks(
            self.work / "shards", merge_tasks(encoded, self.config.shard_bytes), merge, self.jobs, self.shard
        )
        assert merged is not None  # it takes over what other jobs don't do
        return Encoded(survey, encoder, encoded, merged)

    def put_together(
        self,
        folder: Path,
        encoded: "Encoded",
        files_read: int,
        left_out: Mapping[str, int],
        inputs: dict[str, Any],
        met: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """Writes token files, tokenizer and manifest to the folder; returns the manifest.

        left_out: numbers of unread files by suffix, for the manifest. met: what reading the files has met, as
        `ReadStats.facts`, if not these stages have read them.
        """
        folder.mkdir()
        files: dict[str, FileRecord] = {}
        for number, counts in enumerate(encoded.merged):
            for name in counts["files"]:
                (folder / name).parent.mkdir(exist_ok=True)
                link_or_copy(self.of("shards", number) / name, folder / name)
            files |= counts["files"]
        tokenizer = encoded.encoder.tokenizer
        manifest = {
            "format": FORMAT,
            "dtype": token_dtype(tokenizer.vocab_size),
            "tokenizer": {"vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256},
            "encoder": encoded.encoder.name,
            **(met or encoded.survey.read),
            "files_read": files_read,
            "files_left_out": dict(left_out),
            "origins": self.corpus.origins,
            **split_facts(encoded.counts),
            **self.gzip_facts(encoded.counts),
            "files": files | tokenizer.save(folder),
            "inputs": inputs,
        }
        write_manifest(folder, manifest)
        return manifest

    def of(self, stage: str, number: int) -> Path:
        return task_folder(self.work / stage, number)

    def survey(self, tasks: list[Task], files_read: int) -> Survey:
        work = functools.partial(survey_task, corpus=self.corpus, checked=CHECKED // len(tasks) + 1)
        survey = survey_of(self.stage("survey", tasks, work, "reading", None, take_over=False))
        if not survey.hashes:
            remove(self.work)
            config = self.config
            given = config.paths or (config.sources and f"of {', '.join(config.sources)}") or "the standard library"
            why = "".join(f"; {note.partition(': ')[2]}" for note in notes(survey.read, files_read, {}))
            raise ConfigError(f"data.paths={given}: no text in {files_read} files{why}")
        return survey

    def train_tokenizer(self, tasks: list[Task], survey: Survey, last_validation: int) -> Tokenizer:
        config = self.config
        given = config.tokenizer_weights
        weights = (
            None if given is None else {origin: given[self.corpus.origins[origin]] for origin in survey.text_bytes}
        )
        share = shares(survey.text_bytes, weights, config.tokenizer_bytes)
        sample = functools.partial(sample_task, corpus=self.corpus, last_validation=last_validation, shares=share)
        self.stage("sample", tasks, sample, "choosing texts for the tokenizer", survey.size)
        train = functools.partial(
            train_task,
            samples=[self.of("sample", number) / SAMPLE for number in range(len(tasks))],
            vocab_size=config.vocab_size,
            pretokenization=config.pretokenization,
        )
        self.stage("tokenizer", [{"tasks": len(tasks)}], train, "learning the tokenizer", None)
        return Tokenizer.from_file(self.of("tokenizer", 0)).ending_with(config.end_token)

    def gzip_facts(self, encoded: list[Counts]) -> dict[str, Any]:
        """The size of the validation text under gzip -9."""
        paths = [self.of("encoding", number) / HELD_OUT for number in range(len(encoded))]
        size = sum(path.stat().st_size for path in paths)
        gzip_bytes = compressed(block for path in paths for block in blocks(path))
        return {"gzip_bytes": gzip_bytes if size else None, "gzip_bpb": 8 * gzip_bytes / size if size else None}


def train_task(
    task: Task, folder: Path, advance: Advance, *, samples: list[Path], vocab_size: int, pretokenization: str
) -> Counts:
    """Trains the tokenizer on the sampled texts of all tasks."""

    def texts() -> Iterable[str]:
        for path in samples:
            for text in read_texts(path):
                advance(len(text.encode()))
                yield text

    Tokenizer.train(texts(), vocab_size, pretokenization).save(folder)
    return {}


def compressed(blocks: Iterable[bytes]) -> int:
    """The size of the bytes under gzip -9."""
    gzip = zlib.compressobj(9, zlib.DEFLATED, 31)  # 31: with gzip's header and trailer
    return sum(len(gzip.compress(block)) for block in blocks) + len(gzip.flush())


def split_facts(encoded: list[Counts]) -> dict[str, Any]:
    """Documents, tokens and bytes of each split, and of each source in it.

    Bytes of answers only with conversations, in which they are less than those of the text.
    """
    splits = {split: added([counts["splits"][split]["all"] for counts in encoded]) for split in SPLITS}
    origins: dict[str, dict[str, dict[str, int]]] = {split: {} for split in SPLITS}
    for counts in encoded:
        for split in SPLITS:
            for name, numbers in counts["splits"][split]["origins"].items():
                origins[split][name] = added([origins[split].get(name, {}), numbers])
    if all(numbers["answer_bytes"] == numbers["text_bytes"] for numbers in splits.values()):
        for numbers in [*splits.values(), *(found for of_split in origins.values() for found in of_split.values())]:
            del numbers["answer_bytes"]
    return {"splits": splits, "splits_by_origin": origins}


def others_have_work(label: str, shard: Shard) -> RunStopped:
    return RunStopped(
        f"data: job {shard} has done its part of {label}; the other jobs have theirs left to do, and the last of them "
        "goes on",
        code=0,
    )


def summary(manifest: dict[str, Any], folder: Path, seconds: float) -> str:
    train, validation = (manifest["splits"][split] for split in SPLITS)
    return (
        f"prepared {train['documents']} training and {validation['documents']} validation documents, "
        f"{(train['text_bytes'] + validation['text_bytes']) / 1e6:.1f} MB, "
        f"{(train['tokens'] + validation['tokens']) / 1e6:.2f} M tokens, in {seconds:.1f} s: {utf8_path(folder)}"
    )
