"""Sources with weights: exact shares in one order, validation by source, and nothing new without weights."""

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3_lightning.data.batches.module import TextDataModule
from dsv3_lightning.data.config import DataConfig, SourceConfig, WeightChange
from dsv3_lightning.errors import ConfigError

Make = Callable[..., TextDataModule]
STEPS, SIZE = 30, 8
WEIGHTS = {"english": 0.5, "chinese": 0.25, "code": 0.25}
SCHEDULE = [WeightChange(step=7, weights={"chinese": 0.5}), WeightChange(step=19, weights={"english": 0, "code": 0.75})]


@pytest.fixture(scope="module")
def sourced(tmp_path_factory: pytest.TempPathFactory, make_config: Callable[..., DataConfig]) -> DataConfig:
    """Three sources of 40, 12 and 20 documents, whose texts begin with the source's name."""
    folder, rng = tmp_path_factory.mktemp("sources"), random.Random(0)
    sources = {}
    for (name, weight), documents in zip(WEIGHTS.items(), (40, 12, 20), strict=True):
        words = [f"{name} {i} " + " ".join(rng.choices("ab cd efg hij k".split(), k=60)) for i in range(documents)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
        sources[name] = SourceConfig(paths=[str(folder / f"{name}.jsonl")], weight=weight)
    return make_config(folder, paths=[], sources=sources, batch_size=SIZE, sequence_length=48)


def with_sources(config: DataConfig, weights_schedule: Any = None, **changes: dict[str, Any]) -> DataConfig:
    assert config.sources is not None
    sources = {name: dataclasses.replace(source, **changes.get(name, {})) for name, source in config.sources.items()}
    return dataclasses.replace(config, sources=sources, weights_schedule=weights_schedule)


def without_weights(config: DataConfig) -> DataConfig:
    return with_sources(config, **{name: {"weight": None} for name in WEIGHTS})


def drawn(modules: list[TextDataModule], steps: int) -> list[int]:
    """Sample ids of the next steps, in the order of step and rank."""
    loaders = [iter(module.train_dataloader()) for module in modules]
    return [sample for _ in range(steps) for loader in loaders for sample in next(loader)["sample_ids"].tolist()]


def sources_of(module: TextDataModule, ids: list[int]) -> list[str]:
    """The source of each sample by what its text begins with."""
    dataset, bos, found = module._datasets["train"], module.tokenizer.bos_id, {}
    for sample in set(ids):
        pieces = range(dataset.index.samples[sample], dataset.index.samples[sample + 1])
        starts = [int(np.flatnonzero(dataset.file.tokens[: dataset.index.starts[p] + 1] == bos)[-1]) for p in pieces]
        texts = [module.tokenizer.decode(dataset.file.tokens[at + 1 : at + 20].tolist()) for at in starts]
        (found[sample],) = {text.split()[0] for text in texts}
    return [found[sample] for sample in ids]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
def test_two_resumes_on_other_ranks_keep_the_mixed_order(
    sourced: DataConfig, make_module: Make, ranks: int, packing: str
) -> None:
    config = dataclasses.replace(with_sources(sourced, SCHEDULE), packing=packing)
    whole = drawn([make_module(config, max_steps=STEPS)], STEPS)
    seen: list[int] = []
    state: dict[str, Any] | None = None
    for start, stop, size in ((0, 5, 1), (5, 12, ranks), (12, STEPS, ranks)):
        modules = [
            make_module(config, max_steps=STEPS, rank=rank, ranks=size, state=state, step=start) for rank in range(size)
        ]
        seen += drawn(modules, stop - start)
        assert (
            drawn(modules, 1) == seen[start * SIZE : (start + 1) * SIZE]
        )  # a second loader begins where the first did
        for module in modules:
            module.trainer.global_step = stop  # type: ignore[misc, union-attr]
        states = [json.loads(json.dumps(module.state_dict())) for module in modules]
        state = states[0]
        assert states == [state] * size and state["next_sample"] == stop * SIZE  # of any rank, for any number of them
    assert seen == whole
    names = sources_of(make_module(config, max_steps=STEPS), whole)
    for first, last, shares in ((0, 7, (4, 2, 2)), (7, 19, (3.2, 3.2, 1.6)), (19, 30, (0, 3.2, 4.8))):
        counts = Counter(names[first * SIZE : last * SIZE])
        for name, share in zip(WEIGHTS, shares, strict=True):
            assert counts[name] == pytest.approx(share * (last - first), abs=1.5)
    steps = [Counter(names[8 * step : 8 * step + 8]) for step in range(7)]
    assert steps == [Counter(english=4, chinese=2, code=2)] * 7  # every step of the first phase


def test_without_weights_everything_is_as_with_paths(sourced: DataConfig, make_module: Make, tmp_path: Path) -> None:
    assert sourced.sources is not None
    paths = [path for source in sourced.sources.values() for path in source.paths]
    plain = make_module(dataclasses.replace(sourced, sources=None, paths=paths), max_steps=STEPS)
    named = make_module(without_weights(sourced), max_steps=STEPS)
    assert named.state_dict() == plain.state_dict() and named.source_names == list(WEIGHTS)
    assert drawn([named], STEPS) == drawn([plain], STEPS)


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_validation_batch_is_of_one_source(sourced: DataConfig, make_module: Make, ranks: int) -> None:
    for config in (sourced, without_weights(sourced)):
        modules = [make_module(config, rank=rank, ranks=ranks) for rank in range(ranks)]
        batches = [
            batch for same_time in zip(*(m.val_dataloader() for m in modules), strict=True) for batch in same_time
        ]
        sizes: Counter[str] = Counter()
        for batch in batches:
            name = modules[0].source_names[int(batch["source"])]
            found = batch["origins"][batch["mask"]].tolist()
            assert {modules[0].origins[origin] for origin in found} <= {name}
            sizes[name] += int(batch["target_bytes"].sum())
        total = modules[0].manifest["splits"]["validation"]["text_bytes"]
        assert sum(sizes.values()) == total and set(sizes) == set(WEIGHTS)
    assert "source" not in next(iter(modules[0].train_dataloader()))
    limited = make_module(sourced)
    limited.limit_val_batches = 1
    assert {int(batch["source"]) for batch in limited.val_dataloader()} == {0, 1, 2}


def test_weights_may_change_after_a_checkpoint_but_not_before(sourced: DataConfig, make_module: Make) -> None:
    module = make_module(with_sources(sourced, SCHEDULE), max_steps=STEPS)
    module.trainer.global_step = 10  # type: ignore[misc, union-attr]
    state = module.state_dict()
    later = [SCHEDULE[0], WeightChange(step=10, weights={"english": 9})]
    changed = make_module(with_sources(sourced, later), max_steps=STEPS, state=state, step=10)
    assert Counter(sources_of(changed, drawn([changed], 10)))["english"] == pytest.approx(80 * 9 / 9.75, abs=1.5)
    earlier = [WeightChange(step=6, weights={"chinese": 0.5}), *SCHEDULE[1:]]
    for config in (with_sources(sourced, earlier), sourced, with_sources(sourced, SCHEDULE, code={"weight": 0.3})):
        with pytest.raises(
            ConfigError, match="^checkpoint: its samples are .*; and the same weights and epochs so far$"
        ):
            make_module(config, max_steps=STEPS, state=state, step=10)


def test_tokens_count_as_steps_do(sourced: DataConfig, make_module: Make) -> None:
    in_tokens = [WeightChange(tokens=change.at * SIZE * 48, weights=change.weights) for change in SCHEDULE]
    first, second = (
        make_module(with_sources(sourced, schedule), max_steps=STEPS) for schedule in (SCHEDULE, in_tokens)
    )
    assert drawn([first], STEPS) == drawn([second], STEPS)


def test_epochs_are_passes_of_the_run(sourced: DataConfig, make_module: Make) -> None:
    counts = dict(zip(WEIGHTS, make_module(sourced)._samples_of_sources("train"), strict=True))
    chinese = counts["chinese"][1]
    beside = make_module(with_sources(sourced, chinese={"weight": None, "epochs": 2.5}), max_steps=STEPS)
    found = Counter(sources_of(beside, drawn([beside], STEPS)))
    assert found["chinese"] == int(2.5 * chinese)
    assert found["english"] == pytest.approx((STEPS * SIZE - found["chinese"]) * 2 / 3, abs=1.5)
    at_most = make_module(with_sources(sourced, chinese={"epochs": 1}), max_steps=STEPS)
    assert Counter(sources_of(at_most, drawn([at_most], STEPS)))["chinese"] == chinese
    assert at_most.passes_by_source(STEPS)["chinese"] == 1
    only = {name: {"weight": None, "epochs": epochs} for name, epochs in zip(WEIGHTS, (1, 3, 2), strict=True)}
    total = sum(only[name]["epochs"] * count for name, (_, count) in counts.items())  # type: ignore[operator]
    config = with_sources(sourced, **only)
    steps = total // SIZE
    module = make_module(config, max_steps=steps)
    passes = module.passes_by_source(steps)
    assert [round(passes[name], 0) for name in WEIGHTS] == [1, 3, 2] and max(passes.values()) <= 3
    with pytest.raises(
        ConfigError, match=rf"^data.sources: all have had their epochs after {total} samples, and the run"
    ):
        make_module(config, max_steps=steps + 1)
    with pytest.raises(
        ConfigError, match=r"^data.sources: the epochs of code are .* none are left for english chinese$"
    ):
        make_module(with_sources(sourced, code={"weight": None, "epochs": 999}), max_steps=2)


def test_a_source_whose_documents_are_all_held_out_is_named(
    make_config: Callable[..., DataConfig], make_module: Make, tmp_path: Path
) -> None:
    sources = {}
    for name, documents in (("a", 30), ("b", 30)):
        lines = [json.dumps({"text": f"{name} {i}" if name == "a" else "the same"}) + "\n" for i in range(documents)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
        sources[name] = SourceConfig(paths=[str(tmp_path / f"{name}.jsonl")], weight=1.0)
    config = make_config(tmp_path, paths=[], sources=sources, validation_fraction=0.99)
    with pytest.raises(ConfigError, match=r"^data.sources.b: has weight=1.0, but no training documents$"):
        make_module(config)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([WeightChange(weights={"code": 1})], r"data.weights_schedule\[0\]: needs either step or tokens"),
        ([WeightChange(step=2, tokens=3, weights={"code": 1})], r"data.weights_schedule\[0\]: needs either step or"),
        (
            [WeightChange(step=2, weights={"code": 1}), WeightChange(tokens=99, weights={"code": 1})],
            r"data.weights_schedule\[1\]: all entries need step, or all need tokens",
        ),
        ([WeightChange(step=2, weights={"latin": 1})], r"weights.latin: is no source with a weight; those are english"),
        ([WeightChange(step=2, weights={"code": -1})], r"weights.code=-1: must be at least 0"),
        ([WeightChange(step=2, weights=dict.fromkeys(WEIGHTS, 0))], r"\[0\]: no source has a weight above 0"),
        ([WeightChange(step=0, weights={"code": 1})], r"data.weights_schedule: is at \[0\]; must rise, from 1 on"),
    ],
)
def test_a_schedule_that_means_nothing_is_refused(
    sourced: DataConfig, schedule: list[WeightChange], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        with_sources(sourced, schedule)
    with pytest.raises(ConfigError, match=r"^data.weights_schedule: needs data.sources with weights$"):
        dataclasses.replace(without_weights(sourced), weights_schedule=schedule)
