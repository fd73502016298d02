"""TextDataModule: batches from prepared text, in the same order for any number of ranks, loaders and resumes."""

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from dsv3_lightning.data.batches.dataset import PackedDataset
from dsv3_lightning.data.batches.index import cuts_of, make_index, open_index, prepare_index, samples_by_origin
from dsv3_lightning.data.batches.loader import Loader
from dsv3_lightning.data.batches.mixture import Mixture
from dsv3_lightning.data.batches.ramp import batch_sizes
from dsv3_lightning.data.batches.sampling import ORDER, Layout, TrainSampler, ValidationSampler
from dsv3_lightning.data.batches.shares import mixture_of
from dsv3_lightning.data.batches.skips import Skip, shifted
from dsv3_lightning.data.config import DataConfig
from dsv3_lightning.data.text.compressors import compressed_sources
from dsv3_lightning.data.text.prepare import prepare
from dsv3_lightning.data.text.progress import say
from dsv3_lightning.data.text.store import TokenFile, read_manifest, shards_of
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError

MANY_PASSES = 4  # up to so many are nearly as good as new text (arXiv 2305.16264)


class TextDataModule(LightningDataModule):
    """Serves batches of `PackedDataset`; those of validation have `target_bytes` and `origins`. Raises ConfigError.

    With `data.sources`, a validation batch is of one source, whose number is its `source`. If they have weights, the
    samples of the training split follow a `Mixture`.

    To Lightning the whole run is one epoch of max_steps · accumulate_grad_batches micro-batches; in a pipeline, whose
    micro-batches a strategy names as `pipeline_micro_batches`, of max_steps batches. While `batch_ramp`
    lets the batch grow, a step has fewer of them (see `micro_batches`), which PretrainModule takes care of.
    Saved state: `next_sample`, the run's number of the first sample of the next step, and `index`, a hash of everything
    that these numbers depend on. Save between optimizer steps: a step that is cut short is drawn again from its
    first sample.
    whole_steps: the first micro-batch of a step also holds the tokens of all of them.
    limit_val_batches: at most so many batches of `batch_size` samples in a validation, or a share of them (Lightning's
    own counts micro-batches).
    known: the inputs that the run's data were made from; `prepare` refuses others.
    """

    def __init__(
        self,
        config: DataConfig,
        mtp_depth: int,
        max_steps: int,
        whole_steps: bool = False,
        limit_val_batches: int | float = 1.0,
        known: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if config.sequence_length <= mtp_depth:
            raise ConfigError(
                f"data.sequence_length={config.sequence_length}: too short for "
                f"model.num_nextn_predict_layers={mtp_depth}; needs at least {mtp_depth + 1}"
            )
        self.config, self.mtp_depth, self.max_steps = config, mtp_depth, max_steps
        self.whole_steps, self.limit_val_batches, self.known = whole_steps, limit_val_batches, known
        self._folder: Path | None = None
        self._datasets: dict[str, PackedDataset] = {}
        self._index_hash = ""
        self._mixture: Mixture | None = None
        self._layout = Layout(config.batch_size)
        self._first_step, self._first_sample, self._restored = 0, 0, False
        self.skips: list[Skip] = []  # what the run leaves out; LossSpike sets those that are newer than a checkpoint

    def prepare_tokens(self, tell: Callable[[str], None] = say) -> Path:
        """Prepares the token files, unless that is done. tell: called with each note of `prepare`."""
        if self._folder is None:
            self._folder = prepare(self.config, self.known, tell)
        return self._folder

    def prepare_data(self) -> None:
        prepare_index(self.prepare_tokens(), cuts_of(self.config, self.mtp_depth))
        if self.config.sources is not None:
            compressed_sources(self.prepared, self.tokenizer)  # which the report shows

    def setup(self, stage: str | None = None) -> None:
        if self.trainer is not None:  # one rank per node has prepared; the others needn't read the corpus to find it
            self._folder = self.trainer.strategy.broadcast(self._folder)
        elif self._folder is None:
            self.prepare_data()
        self._layout = self._full_layout()  # later the Trainer's number of micro-batches follows the batch ramp
        self._datasets["validation"] = self._dataset("validation")
        if stage in ("fit", None):
            for size in np.unique(self.batch_sizes):
                self._layout.of_step(int(size))  # refuses a batch that can't be dealt out
            self._first_step, self._first_sample, self._restored = 0, 0, False
            self._datasets["train"] = self._dataset("train")
            self._mixture = self._mix() if self.config.is_mixed else None
            self._index_hash = self._hash()
            rank_zero_only(say)(self.length_note())

    def train_dataloader(self) -> "Loader":
        layout, step = self._layout, self.trainer.global_step if self.trainer is not None else 0
        if step and not self._restored:
            raise ConfigError(f"checkpoint of step {step}: the position in the data is missing")
        self._first_step = step
        dataset = self._datasets["train"]
        sampler = TrainSampler(
            len(dataset),
            layout,
            self.config.seed,
            self.max_steps,
            first_step=step,
            first_sample=self._first_sample,
            sizes=self.batch_sizes,
            skips=self.skips,
            mixture=self._mixture,
        )
        return Loader(dataset, sampler, self.config.num_workers)

    def val_dataloader(self) -> "Loader | list[Any]":
        dataset = self._datasets["validation"]
        if not len(dataset):
            fraction = self.config.validation_fraction
            rank_zero_only(say)(f"validation is off: data.validation_fraction={fraction} holds out no document")
            return []
        sources = self._samples_of_sources("validation") if self.config.sources is not None else None
        sampler = ValidationSampler(len(dataset), self._layout, self.limit_val_batches, sources)
        return Loader(dataset, sampler, self.config.num_workers)

    def transfer_batch_to_device(
        self, batch: dict[str, Tensor], device: torch.device, dataloader_idx: int
    ) -> dict[str, Tensor]:
        """Leaves the numbers of documents on the host, where the model reads them without waiting for a GPU."""
        on_host = {name: batch[name] for name in ("documents", "step_documents") if name in batch}
        rest = {name: value for name, value in batch.items() if name not in on_host}
        return super().transfer_batch_to_device(rest, device, dataloader_idx) | on_host

    def state_dict(self) -> dict[str, Any]:
        step = self.trainer.global_step if self.trainer is not None else 0
        position = self.position(step)
        return {"next_sample": position, "skips": self.skips, "index": self._hash_before(position, self.skips)}

    def _hash_before(self, position: int, skips: Sequence[Skip]) -> str:
        """A hash of what determines the run's samples before this position; of all of them without weights."""
        if self._mixture is None:
            return self._index_hash
        return hash_of(self._index_hash, self._mixture.digest(shifted(position, skips)))

    def position(self, step: int) -> int:
        """The number of samples that the run has drawn in its first `step` optimizer steps."""
        sizes, first = self.batch_sizes, self._first_step
        return self._first_sample + int(sizes[first:step].sum()) - int(sizes[step:first].sum())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "train" not in self._datasets:  # only validating: other data than in training is fine
            return
        if missing := {"next_sample", "skips", "index"} - state_dict.keys():
            raise ConfigError(f"checkpoint: the position in the data lacks {', '.join(sorted(missing))}")
        expected = self._hash_before(state_dict["next_sample"], state_dict["skips"])
        if state_dict["index"] != expected:
            mixed = "; and the same weights and epochs so far" if self._mixture is not None else ""
            raise ConfigError(
                f"checkpoint: its samples are {state_dict['index']}, these are {expected}; "
                "resuming needs the same data.paths, tokenizer, sequence_length, seed and MTP depth, "
                f"and a version that orders samples alike{mixed}"
            )
        self._first_sample, self._restored = state_dict["next_sample"], True
        self.skips = self.skips or [(at, length) for at, length in state_dict["skips"]]

    @property
    def prepared(self) -> Path:
        """The folder of the token files, available after `prepare_data` or `setup`."""
        assert self._folder is not None, "call prepare_data or setup first"
        return self._folder

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the token files: counts of both splits, sizes and hashes of the files."""
        return read_manifest(self.prepared)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(self.prepared)

    @property
    def gzip_bpb(self) -> float | None:
        """Bits per byte of gzip -9 on the validation text (the assistant's in conversations); None without one."""
        bpb: float | None = self.manifest["gzip_bpb"]
        return bpb

    @property
    def origins(self) -> list[str]:
        """Names of the documents' origins, which a batch's `origins` index."""
        names: list[str] = self.manifest["origins"]
        return names

    @property
    def source_names(self) -> list[str]:
        """The names in data.sources; a validation batch's `source` is an index into them."""
        return list(self.config.sources or ())

    @property
    def train_tokens(self) -> int:
        return int(self.manifest["splits"]["train"]["tokens"])

    @cached_property
    def batch_sizes(self) -> np.ndarray:
        """Samples of each optimizer step of the run, over all ranks and micro-batches: int64 [max_steps]."""
        return np.array(batch_sizes(self.config, self.max_steps), dtype=np.int64)

    def micro_batches(self, step: int) -> int:
        """Micro-batches of each rank in the step after the run's first `step` steps."""
        size = self.batch_sizes[min(step, self.max_steps - 1)]
        return self._layout.of_step(int(size)).accumulate

    def tokens_before(self, step: int) -> int:
        """Positions of the run's first `step` optimizer steps, over all ranks."""
        return int(self.batch_sizes[:step].sum()) * self.config.sequence_length

    @property
    def train_samples(self) -> int:
        """Samples of one epoch."""
        return len(self._datasets["train"] if "train" in self._datasets else self._dataset("train"))

    def passes(self, step: int) -> float:
        """Number of passes over the training data in the run's first `step` optimizer steps."""
        return int(self.batch_sizes[:step].sum()) / self.train_samples

    @property
    def compressed(self) -> dict[str, dict[str, Any]]:
        """What gzip and xz need for the validation text of each source."""
        return compressed_sources(self.prepared, self.tokenizer) if self.config.sources is not None else {}

    def passes_by_source(self, step: int) -> dict[str, float]:
        """Passes over each source with a share of the run in its first `step` optimizer steps."""
        if self._mixture is None:
            return {}
        given = self._mixture.given(int(self.batch_sizes[:step].sum()))
        return {
            name: drawn / count
            for name, drawn, count in zip(self.source_names, given, self._mixture.counts, strict=True)
        }

    def length_note(self) -> str:
        if by_source := self.passes_by_source(self.max_steps):
            return mixed_note(by_source)
        return length_note(self.passes(self.max_steps), self.train_tokens)

    def _mix(self) -> Mixture:
        sizes, full = self.batch_sizes, self.config.batch_size

        def first_of(step: int) -> int:
            return int(sizes[:step].sum()) + max(0, step - len(sizes)) * full

        return mixture_of(self.config, self._samples_of_sources("train"), int(sizes.sum()), first_of)

    def _samples_of_sources(self, split: str) -> list[tuple[int, int]]:
        """The first sample of each source in the index, and how many it has."""
        dataset = self._datasets[split]
        places = {self.origins[k]: place for k, place in samples_by_origin(dataset.file, dataset.index).items()}
        return [places.get(name, (0, 0)) for name in self.source_names]

    @property
    def validation_bytes(self) -> int:
        """Bytes of the validation split's targets; the sum of `target_bytes` over its batches."""
        split = self.manifest["splits"]["validation"]
        return int(split.get("answer_bytes", split["text_bytes"]))

    def _dataset(self, split: str) -> PackedDataset:
        file = TokenFile(self.prepared, split)
        length, depth = self.config.sequence_length, self.mtp_depth
        mask, pad_id, isolate = self.config.mask_document_ends, self.tokenizer.pad_id, self.config.isolate_documents
        per_token, origins = (None, None) if split == "train" else (self.tokenizer.bytes_per_token(), file.origins())
        cut = cuts_of(self.config, self.mtp_depth)[split]
        found = open_index(self.prepared, split, cut)  # None where the folder can't be written
        index = make_index(file, cut) if found is None else found
        return PackedDataset(
            file, index, length, depth, pad_id, mask, isolate, file.loss_spans(), per_token, origins, self.whole_steps
        )

    def _hash(self) -> str:
        return data_hash(self._datasets["train"], self.manifest, self.config.seed)

    def _full_layout(self) -> Layout:
        """The division of steps of `batch_size` samples. Raises ConfigError."""
        if self.trainer is None:
            return Layout(self.config.batch_size)
        strategy = self.trainer.strategy
        ranks = getattr(strategy, "data_ranks", self.trainer.world_size)  # ours, where a pipeline has fewer
        rank = getattr(strategy, "data_rank", self.trainer.global_rank)
        pipelined = getattr(strategy, "pipeline_micro_batches", None)
        accumulate = self.trainer.accumulate_grad_batches if pipelined is None else pipelined
        return Layout(self.config.batch_size, accumulate, ranks, rank, pipelined is not None)


def length_note(passes: float, tokens: int) -> str:
    """A note on the number of passes over the data, with a warning if it is large.

    >>> length_note(0.25, 1_000_000)
    'data: the run makes 0.25 passes over its 1,000,000 training tokens'
    """
    note = f"the run makes {passes:,.3g} passes over its {tokens:,} training tokens"
    if passes <= MANY_PASSES:
        return f"data: {note}"
    return f"warning: {note}; beyond {MANY_PASSES} passes it learns little more, and memorizes short data"


def mixed_note(passes: dict[str, float]) -> str:
    """A note on the number of passes over each source, with a warning if one is large.

    >>> mixed_note({"english": 0.5, "chinese": 2})
    'data: the run makes 0.5 passes over english, 2 over chinese'
    >>> mixed_note({"english": 5, "chinese": 2})
    'warning: the run makes 5 passes over english, 2 over chinese; beyond 4 passes over a source it learns little more'
    """
    note = "the run makes " + ", ".join(
        f"{number:,.3g}{' passes' * (not place)} over {name}" for place, (name, number) in enumerate(passes.items())
    )
    if max(passes.values()) <= MANY_PASSES:
        return f"data: {note}"
    return f"warning: {note}; beyond {MANY_PASSES} passes over a source it learns little more"


def hash_of(*parts: Any) -> str:
    return hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).hexdigest()


def data_hash(dataset: PackedDataset, manifest: dict[str, Any], seed: int) -> str:
    """A hash of the tokens, the packed samples and their order, as 16 hexadecimal digits."""
    shards = [manifest["files"][f"{name}.bin"]["sha256"] for name in shards_of(manifest, "train")]
    return hash_of(*shards, dataset.index.digest(), ORDER, seed)
