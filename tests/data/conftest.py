"""A small corpus with every length that matters, prepared once, and stand-ins for ranks."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsv3_lightning.data.batches.module import TextDataModule
from dsv3_lightning.data.config import DataConfig

WORDS = "def return import class self for in if else None True value 12 345 naïve 数据 (x): \n    += '' # 🙂".split(" ")


@pytest.fixture(scope="session")
def make_config() -> Callable[..., DataConfig]:
    """A function: folder and changed fields to DataConfig."""

    def make(folder: Path, **changes: Any) -> DataConfig:
        config = DataConfig(
            paths=[str(folder / "corpus")],
            sources=None,
            cleaning=None,
            text_key="text",
            skip_bad_lines=False,
            cache_dir=str(folder / "cache"),
            tokenizer=None,
            end_token=None,
            vocab_size=400,
            pretokenization="v3",
            tokenizer_bytes=1 << 27,
            tokenizer_weights=None,
            fim_rate=0.0,
            split_rate=0.0,
            shard_bytes=1 << 28,
            max_document_bytes=1 << 30,
            sequence_length=96,
            packing="best_fit",
            weights_schedule=None,
            batch_size=8,
            batch_ramp=None,
            validation_fraction=0.2,
            mask_document_ends=False,
            isolate_documents=False,
            seed=1,
            num_workers=0,
        )
        return dataclasses.replace(config, **changes)

    return make


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """60 documents of 2 to 200 words, and a few of one or two characters."""
    rng = random.Random(0)
    return ["a", "b", "ab", "é"] + [" ".join(rng.choices(WORDS, k=rng.randint(2, 200))) for _ in range(56)]


@pytest.fixture(scope="session")
def config(
    tmp_path_factory: pytest.TempPathFactory, make_config: Callable[..., DataConfig], texts: list[str]
) -> DataConfig:
    """The corpus of `texts` as one jsonl, not prepared yet: whoever is first prepares it for all."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "corpus").mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "corpus" / "all.jsonl").write_text(lines, encoding="utf-8")
    return make_config(folder)


@pytest.fixture(scope="session")
def make_module() -> Callable[..., TextDataModule]:
    """A function: DataConfig and rank, ranks, accumulate, step of a pretended trainer to a set up TextDataModule."""

    def make(
        config: DataConfig,
        *,
        mtp_depth: int = 1,
        max_steps: int = 10,
        rank: int = 0,
        ranks: int = 1,
        accumulate: int = 1,
        state: dict[str, Any] | None = None,
        step: int = 0,
    ) -> TextDataModule:
        module = TextDataModule(config, mtp_depth, max_steps)
        module.trainer = SimpleNamespace(  # type: ignore[assignment]
            world_size=ranks,
            global_rank=rank,
            accumulate_grad_batches=accumulate,
            global_step=0,
            strategy=SimpleNamespace(broadcast=lambda value: value),
        )
        module.prepare_data()
        module.setup("fit")
        if state is not None:
            module.load_state_dict(state)
        module.trainer.global_step = step  # type: ignore[misc, union-attr]
        return module

    return make
