"""What Lightning gets: one order for all ranks, workers and resumes, and a validation that adds up."""

import dataclasses
import itertools
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from dsv3_lightning.data.batches.module import TextDataModule
from dsv3_lightning.data.batches.permutation import permuted
from dsv3_lightning.data.config import BatchRamp, DataConfig
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError

Make = Callable[..., TextDataModule]
STEPS = 10


def train_ids(module: TextDataModule) -> list[list[int]]:
    return [batch["sample_ids"].tolist() for batch in module.train_dataloader()]


def merge(by_rank: list[list[list[int]]]) -> list[int]:
    """Sample ids in the order of step, micro-batch, rank."""
    return [sample for same_time in zip(*by_rank) for of_rank in same_time for sample in of_rank]


@pytest.fixture(scope="module")
def order(config: DataConfig, make_module: Make) -> list[int]:
    """The sample ids of a run of 10 steps in one process, which ends in the second epoch."""
    module = make_module(config, max_steps=STEPS)
    assert 40 < module.train_samples < STEPS * config.batch_size
    return merge([train_ids(module)])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 1), (2, 2)])
def test_loader_processes_keep_the_order(
    config: DataConfig, make_module: Make, order: list[int], workers: int, ranks: int, accumulate: int
) -> None:
    config = dataclasses.replace(config, num_workers=workers)
    modules = [
        make_module(config, max_steps=STEPS, rank=rank, ranks=ranks, accumulate=accumulate) for rank in range(ranks)
    ]
    assert merge([train_ids(module) for module in modules]) == order


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_outlive_the_signals_that_stop_a_run(config: DataConfig, make_module: Make, order: list[int]) -> None:
    """A run that is asked to stop finishes its step: Ctrl-C and SLURM's signals reach its workers as well."""
    before = torch.multiprocessing.active_children()  # of other tests
    batches = iter(make_module(dataclasses.replace(config, num_workers=2), max_steps=STEPS).train_dataloader())
    first = next(batches)
    workers = [worker for worker in torch.multiprocessing.active_children() if worker not in before]
    assert len(workers) == 2
    for name in ("INT", "USR1", "HUP", "TERM"):
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    assert merge([[batch["sample_ids"].tolist() for batch in (first, *batches)]]) == order
    for worker in workers:  # as their own process does when it exits, and then waits for them
        worker.terminate()
        worker.join(20)
        assert worker.exitcode == 0


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_go_on_from_any_step_with_the_same_batches(config: DataConfig, make_module: Make, workers: int) -> None:
    growing = dataclasses.replace(config, batch_ramp=BatchRamp(start=2, increment=2, tokens=96 * 30))
    for step in (0, 3, 7):
        modules = []
        for number in (0, workers):
            module = make_module(dataclasses.replace(growing, num_workers=number), mtp_depth=2, accumulate=2)
            state = module.state_dict() | {"next_sample": int(module.batch_sizes[:step].sum())}
            module.load_state_dict(state)
            module.trainer.global_step = step  # type: ignore[misc, union-attr]
            modules.append(module)
        alone, parallel = (list(module.train_dataloader()) for module in modules)
        for one, other in zip(alone, parallel, strict=True):
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 1), (2, 1), (1, 4), (2, 2), (8, 1)])
def test_resuming_again_and_again_keeps_the_order(
    config: DataConfig, make_module: Make, order: list[int], ranks: int, accumulate: int
) -> None:
    seen: list[int] = []
    state: dict[str, Any] | None = None
    for start, stop in ((0, 3), (3, 4), (4, STEPS)):  # two resumes, the run's ranks changing at the first
        layout = {"ranks": ranks, "accumulate": accumulate} if start else {}
        modules = [
            make_module(config, max_steps=STEPS, rank=rank, state=state, step=start, **layout)
            for rank in range(ranks if start else 1)
        ]
        loaders = [module.train_dataloader() for module in modules]
        assert {len(loader) for loader in loaders} == {STEPS * (accumulate if start else 1)}
        count = (stop - start) * (accumulate if start else 1)
        drawn = [[batch["sample_ids"].tolist() for _, batch in zip(range(count), loader)] for loader in loaders]
        seen += merge(drawn)
        modules[0].trainer.global_step = stop  # type: ignore[misc, union-attr]
        state = json.loads(json.dumps(modules[0].state_dict()))
        assert state is not None and state["next_sample"] == stop * config.batch_size
    assert seen == order


def test_another_batch_size_resumes_with_the_next_sample(config: DataConfig, make_module: Make) -> None:
    state = make_module(config).state_dict() | {"next_sample": 24}
    other = dataclasses.replace(config, batch_size=4)
    module = make_module(other, state=state, step=3, max_steps=5)
    assert merge([train_ids(module)]) == merge([train_ids(make_module(config, max_steps=4))])[24:32]
    module.trainer.global_step = 5  # type: ignore[misc, union-attr]
    assert module.state_dict()["next_sample"] == 32  # not 5 · 4: a second resume would repeat samples


@pytest.mark.parametrize("mask_ends", [False, True])
def test_each_rank_counts_the_targets_of_its_own_samples_for_the_whole_step(
    config: DataConfig, make_module: Make, mask_ends: bool
) -> None:
    config = dataclasses.replace(config, mask_document_ends=mask_ends)
    modules = [make_module(config, mtp_depth=2, rank=rank, ranks=2, accumulate=2) for rank in range(2)]
    batches = [list(module.train_dataloader()) for module in modules]
    total = torch.zeros(3, dtype=torch.int64)
    for step in range(10):
        for of_rank in batches:  # each rank counts its own; training adds them up
            first, second = of_rank[2 * step : 2 * step + 2]
            counted = sum((batch["targets"] != -100).sum((0, 2)) for batch in (first, second))
            assert torch.equal(first["target_counts"], counted) and "target_counts" not in second
            total += counted
    assert total[0] > total[1] > total[2] > 0


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_validation_adds_up_for_any_number_of_ranks(config: DataConfig, make_module: Make, ranks: int) -> None:
    modules = [make_module(config, rank=rank, ranks=ranks) for rank in range(ranks)]
    by_rank = [list(module.val_dataloader()) for module in modules]
    assert len({len(batches) for batches in by_rank}) == 1
    ids = [int(sample) for batches in by_rank for batch in batches for sample in batch["sample_ids"] if sample >= 0]
    total = modules[0].manifest["splits"]["validation"]
    samples = len(make_module(config)._datasets["validation"])
    assert sorted(ids) == list(range(samples)) and samples % 8  # the last batch has rows without a sample
    assert sum(int(batch["target_bytes"].sum()) for batches in by_rank for batch in batches) == total["text_bytes"]
    for same_time in zip(*by_rank):
        assert all(batch["tokens"].shape == same_time[0]["tokens"].shape for batch in same_time)
    # without a mask, every token is a target but a document's first in its sample
    targets = sum(int((batch["targets"][:, 0] != -100).sum()) for batches in by_rank for batch in batches)
    assert total["tokens"] - total["documents"] <= targets < total["tokens"]


@pytest.mark.parametrize("ranks", [1, 4])
def test_fewer_documents_than_ranks_work(
    tmp_path: Path, make_config: Callable[..., DataConfig], make_module: Make, ranks: int
) -> None:
    (tmp_path / "corpus").mkdir()
    for name in ("a", "b"):
        (tmp_path / "corpus" / f"{name}.txt").write_text(f"text {name}")
    config = make_config(tmp_path, vocab_size=300)
    modules = [make_module(config, rank=rank, ranks=ranks, max_steps=2) for rank in range(ranks)]
    assert merge([train_ids(module) for module in modules]) == [0] * 16
    validation = [list(module.val_dataloader()) for module in modules]
    assert [len(batches) for batches in validation] == [1] * ranks
    assert sum(int(batches[0]["mask"].any()) for batches in validation) == 1  # the others have nothing, but a batch


def test_validation_knows_where_each_token_is_from(make_config: Any, make_module: Make, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for origin, letter in (("few", "a"), ("many", "bcd")):
        texts = [f"{origin} {letter * n}" for n in range(1, 40)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / "corpus" / f"{origin}.jsonl").write_text(lines, encoding="utf-8")
    paths = [str(tmp_path / "corpus" / f"{origin}.jsonl") for origin in ("few", "many")]
    module = make_module(make_config(tmp_path, paths=paths, validation_fraction=0.5))
    assert module.origins == ["many.jsonl", "few.jsonl"]  # the largest first
    assert "origins" not in next(iter(module.train_dataloader()))
    bos, seen = module.tokenizer.bos_id, set()
    for batch in module.val_dataloader():
        for tokens, origins, mask in zip(batch["tokens"], batch["origins"], batch["mask"], strict=True):
            cuts = [*(tokens == bos).nonzero().flatten().tolist(), int(mask.sum())]
            for begin, end in itertools.pairwise(cuts):
                text = module.tokenizer.decode(tokens[begin + 1 : end].tolist())
                (origin,) = set(origins[begin:end].tolist())
                assert text.startswith("few" if origin else "many")
                seen.add(origin)
    assert seen == {0, 1}


def test_without_validation_it_says_so(
    config: DataConfig, make_module: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = make_module(dataclasses.replace(config, validation_fraction=0.0, cache_dir=str(tmp_path)))
    capsys.readouterr()
    assert module.val_dataloader() == [] and module.gzip_bpb is None and module.validation_bytes == 0
    assert capsys.readouterr().err == "validation is off: data.validation_fraction=0.0 holds out no document\n"


def test_a_state_of_other_samples_is_refused(config: DataConfig, make_module: Make) -> None:
    state = make_module(config).state_dict()
    make_module(config, state=state)
    for change in ({"seed": 2}, {"sequence_length": 97}):
        with pytest.raises(ConfigError, match=f"^checkpoint: its samples are {state['index']}, these are "):
            make_module(dataclasses.replace(config, **change), state=state)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="^checkpoint: its samples are"):
        make_module(config, mtp_depth=2, state=state)
    for key in state:
        with pytest.raises(ConfigError, match=f"^checkpoint: the position in the data lacks {key}$"):
            make_module(config, state={name: value for name, value in state.items() if name != key})
    with pytest.raises(ConfigError, match="^checkpoint of step 3: the position in the data is missing$"):
        make_module(config, step=3).train_dataloader()


def test_what_cannot_work_is_refused(config: DataConfig, make_module: Make) -> None:
    with pytest.raises(ConfigError, match="^data.sequence_length=2: too short for .*=2; needs at least 3$"):
        TextDataModule(dataclasses.replace(config, sequence_length=2), 2, 1)
    TextDataModule(dataclasses.replace(config, sequence_length=3), 2, 1)
    with pytest.raises(ConfigError, match="^data.batch_size=8: 3 ranks .* multiple of 3, such as 6 or 9$"):
        make_module(config, ranks=3)


def test_what_others_ask_for(config: DataConfig, make_module: Make) -> None:
    module = make_module(config)
    split = module.manifest["splits"]["train"]
    assert module.train_tokens == split["tokens"] and module.validation_bytes > 0 and module.gzip_bpb is not None
    assert isinstance(module.tokenizer, Tokenizer) and (module.prepared / "tokenizer.json").exists()


def test_loading_touches_no_global_random_number(config: DataConfig, make_module: Make) -> None:
    module = make_module(dataclasses.replace(config, num_workers=1))
    before = torch.get_rng_state()
    for loader in (module.train_dataloader(), module.val_dataloader()):
        next(iter(loader))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_dataset_travels_light(config: DataConfig, make_module: Make) -> None:
    dataset = make_module(config)._datasets["train"]
    copy = pickle.loads(pickle.dumps(dataset))  # as to a process that was not forked
    loader = make_module(config).train_dataloader()
    micro_batch = next(iter(loader.batches.sampler))
    assert all(torch.equal(value, dataset[micro_batch][name]) for name, value in copy[micro_batch].items())


class Recorder(LightningModule):
    """The smallest thing that trains; it writes down which samples came."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.trained: list[list[int]] = []
        self.validated: list[int] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.trained.append(batch["sample_ids"].tolist())
        return (self.weight * batch["mask"].sum()).sum()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validated += [sample for sample in batch["sample_ids"].tolist() if sample >= 0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


def trainer_of(folder: Path, steps: int, **arguments: Any) -> Trainer:
    return Trainer(
        max_steps=steps, default_root_dir=folder, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **arguments,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*isinstance")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_resumes_in_the_middle(
    config: DataConfig, order: list[int], tmp_path: Path, accumulate: int, recwarn: pytest.WarningsRecorder
) -> None:
    seen: list[int] = []
    checkpoint: Path | None = None
    for stop in (3, 4, STEPS):  # the second session resumes, the third resumes a resumed one
        trainer = trainer_of(tmp_path, stop, accumulate_grad_batches=accumulate, val_check_interval=2)
        model, data = Recorder(), TextDataModule(config, 1, STEPS)
        trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
        seen += [sample for batch in model.trained for sample in batch]
        checkpoint = tmp_path / f"{stop}.ckpt"
        trainer.save_checkpoint(checkpoint)
        assert trainer.global_step == stop and len(seen) == stop * config.batch_size
        assert trainer.num_training_batches == STEPS * accumulate
    assert seen == order
    assert not [str(warning.message) for warning in recwarn if "resum" in str(warning.message)]
    saved = torch.load(tmp_path / f"{STEPS}.ckpt", weights_only=True)["TextDataModule"]
    assert saved["next_sample"] == STEPS * config.batch_size
    # only validating: other samples than in training are fine
    data = TextDataModule(dataclasses.replace(config, sequence_length=16), 1, STEPS)
    trainer_of(tmp_path, STEPS).validate(model, data, ckpt_path=checkpoint, verbose=False)


@pytest.mark.filterwarnings("ignore:.*isinstance", "ignore:Total length of `list`")
def test_lightning_trains_without_validation(config: DataConfig, tmp_path: Path) -> None:
    model = Recorder()
    data = TextDataModule(dataclasses.replace(config, validation_fraction=0.0, cache_dir=str(tmp_path)), 1, 4)
    trainer_of(tmp_path, 4, val_check_interval=2).fit(model, data)
    assert len(model.trained) == 4 and not model.validated


@pytest.mark.slow
def test_two_processes_draw_one_order(config: DataConfig, order: list[int], tmp_path: Path) -> None:
    """DDP with Lightning's own settings, under which it replaces the sampler of any DataLoader that it finds."""
    code = f"""
import importlib.util, json, sys
from pathlib import Path
from dsv3_lightning.data.config import DataConfig
from dsv3_lightning.data.batches.module import TextDataModule
spec = importlib.util.spec_from_file_location("recorder", {__file__!r})
recorder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recorder)
folder = Path({str(tmp_path)!r})
model, data = recorder.Recorder(), TextDataModule(DataConfig(**{dataclasses.asdict(config)!r}), 1, {STEPS})
trainer = recorder.trainer_of(folder, {STEPS}, devices=2, strategy="ddp", val_check_interval={STEPS})
trainer.fit(model, data)
(folder / f"rank{{trainer.global_rank}}.json").write_text(json.dumps([model.trained, model.validated]))
"""
    (tmp_path / "train.py").write_text(code, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(tmp_path / "train.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    (train0, val0), (train1, val1) = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert merge([train0, train1]) == order
    assert sorted(val0 + val1) == list(range(len(val0 + val1)))
    assert val0 == permuted(np.arange(len(val0 + val1)), len(val0 + val1), 0, 0)[::2].tolist()
