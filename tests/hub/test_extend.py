"""Context extension: a run at 4 and then 8 times its length, from folder to folder, and the needle check on it."""

import json

import pytest
import torch

from dsv3_lightning.cli import main
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.hub.folder import HubFolder
from dsv3_lightning.inference.needle import find_needles, score
from tests.hub.folders import biased
from tests.model.small import small_config

pytestmark = pytest.mark.slow

QUICK = [
    "trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.limit_val_batches=2", "trainer.precision=32",
    "callbacks.throughput.peak_flops=1e11", "callbacks.sample_text=null", "callbacks.router_probe=null",
]  # fmt: skip


@pytest.fixture(scope="module")
def extended(tmp_path_factory, data_cache):
    base = tmp_path_factory.mktemp("extend")

    def run(*words: str) -> None:
        assert main(["run", *words, f"run.dir={base}", *data_cache, *QUICK]) == 0

    def export(name: str) -> str:
        assert main(["export", str(base / name), str(base / f"{name}-hf"), "--verify"]) == 0
        return f"init_from={base / name}-hf"

    run("laptop")
    run("extend", export("laptop"))
    longer = ["model.max_position_embeddings=1024", "data.sequence_length=1024", "data.batch_size=2"]
    run("extend", "run.name=extend-8x", export("extend"), *longer)
    export("extend-8x")
    return base


def test_both_stages_run_and_keep_yarns_factor(extended):
    for name, length in (("extend", 512), ("extend-8x", 1024)):
        report = json.loads((extended / name / "report.json").read_text())
        assert report["tokens"] == 2 * 4 * 512 and report["val_loss"] < 9
        config = HubFolder(extended / f"{name}-hf").config
        assert config.max_position_embeddings == length and config.rope_scaling is not None
        assert config.rope_scaling.factor == 8 and config.rope_scaling.original_max_position_embeddings == 128


def test_the_needle_check_writes_its_map(extended, capsys):
    words = ["--lengths", "64", "1024", "--depths", "3", "--texts", "2"]
    assert main(["needle", str(extended / "extend-8x"), *words]) == 0
    assert "nats per token that the needle saves" in capsys.readouterr().out
    found = json.loads((extended / "extend-8x/needle/needle.json").read_text())
    assert torch.tensor(found["saved"]).shape == (2, 3) and found["depths"] == [0, 0.5, 1]
    assert (extended / "extend-8x/needle/needle.png").stat().st_size > 1000
    assert main(["needle", str(extended / "extend-8x"), "--lengths", "2048"]) == 2
    assert "--lengths 2048: the model's context has 1024 positions" in capsys.readouterr().err


class Copier:
    """Says of a token what followed its latest earlier occurrence: a model that finds every needle."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def __call__(self, ids: list[int], answer: int) -> tuple[float, float]:
        right = 0
        for at in range(len(ids) - answer, len(ids)):
            earlier = [i for i in range(at - 1) if ids[max(i - 3, 0) : i + 1] == ids[at - 4 : at]]
            right += bool(earlier) and ids[earlier[-1] + 1] == ids[at]
        return right / answer, right / answer


def test_a_model_that_copies_finds_every_needle_and_one_that_forgets_finds_none(monkeypatch):
    tokenizer = Tokenizer.train(["some plain words to fill with, 12 34"] * 3, 300)
    model = biased(small_config(vocab_size=tokenizer.vocab_size))
    filler = tokenizer.encode("some plain words to fill with, and more of them " * 60)
    copier = Copier(tokenizer.vocab_size)
    monkeypatch.setattr("dsv3_lightning.inference.needle.score", lambda _, ids, answer, unused: copier(ids, answer))
    found = find_needles(model, tokenizer, filler, [200, 400], [0.0, 0.5, 1.0], 3)
    assert (found.right == 1).all() and (found.saved == 1).all()
    monkeypatch.setattr("dsv3_lightning.inference.needle.score", lambda *_: (0.0, -3.0))
    assert (find_needles(model, tokenizer, filler, [200], [0.5], 2).saved == 0).all()
    with pytest.raises(ConfigError, match=r"--lengths 20: must be from \d\d to \d+"):
        find_needles(model, tokenizer, filler, [200, 20], [0.5], 1)


@torch.no_grad()
def test_the_score_is_that_of_the_training_paths_logits():
    model = biased(small_config())
    ids = torch.randint(61, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    logits = model(torch.tensor([ids]))[0, 34:39].log_softmax(-1)
    wanted = torch.tensor(ids[35:])
    right, likely = score(model, ids, 5)
    assert right == (logits.argmax(-1) == wanted).double().mean().item()
    assert likely == pytest.approx(logits.gather(1, wanted[:, None]).mean().item(), abs=1e-5)
