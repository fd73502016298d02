"""From a run to a folder, from a folder to a run, by the commands."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from dsv3_lightning.cli import main
from dsv3_lightning.config.compose import compose
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.hub.verify import all_logits
from dsv3_lightning.model.init import fill
from dsv3_lightning.runs.models import empty_model, read_weights
from dsv3_lightning.runs.start import RunWeights
from tests.conftest import QUIET, Nano

pytestmark = pytest.mark.slow

SHORT = ["trainer.max_steps=5", "callbacks.checkpoint.every_n_steps=5", "callbacks.sample_text=null"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_cache):
    return Nano(tmp_path_factory.mktemp("hub"), [*data_cache, *QUIET, *SHORT])


@pytest.fixture(scope="module")
def trained(runs):
    return runs.run("trained", "optimizer.lr=1e-2", "optimizer.warmup_steps=1")


@pytest.fixture(scope="module")
def folder(runs, trained):
    tokens = runs.base / "tokens.npy"
    np.save(tokens, np.arange(120).reshape(2, 60))
    assert main(["export", str(trained.folder), str(runs.base / "out"), f"--verify={tokens}"]) == 0
    return runs.base / "out"


def test_the_folder_has_everything_and_names_the_same_tokens(folder):
    names = {path.name for path in folder.iterdir()}
    files = "config.json generation_config.json tokenizer.json tokenizer_config.json README.md"
    assert {*files.split(), "model.safetensors.index.json", "model-00001-of-00001.safetensors"} == names
    config, generation = (json.loads((folder / f"{n}.json").read_text()) for n in ("config", "generation_config"))
    tokenizer = Tokenizer.from_file(folder)
    for content in (config, generation):
        for role in ("bos", "eos", "pad"):
            assert content[f"{role}_token_id"] == getattr(tokenizer, f"{role}_id")
    assert "aux_loss_alpha" not in config
    assert (
        "713,728 parameters" in (folder / "README.md").read_text() and "val_loss" in (folder / "README.md").read_text()
    )


def test_transformers_gives_the_logits_that_verify_wrote(folder):
    from transformers import AutoModelForCausalLM

    tokens = torch.from_numpy(np.load(folder.parent / "verify/tokens.npy"))
    assert tokens.tolist() == np.arange(120).reshape(2, 60).tolist()
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        theirs = model(tokens).logits.numpy()
    np.testing.assert_allclose(np.load(folder.parent / "verify/logits.npy"), theirs, rtol=0, atol=1e-4)
    assert np.load(folder.parent / "verify/mtp_logits.npy").shape == (2, 59, 1024)


TEXTS = [
    "a\r\nb\rc\td", *(f"x{' ' * n}y" for n in range(1, 41)), "e\u0301", "a\ufeffb", "a\0b",
    "\U0001f469\u200d\U0001f680",
    " leading", "Don't stop . , !", "1234 567", "\n\n  \n",
]  # fmt: skip


def test_auto_tokenizer_gives_every_text_back_after_the_begin_token(folder):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.from_file(folder)
    assert theirs.model_max_length == 256
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ids == [ours.bos_id, *ours.encode(text)], text
        assert theirs.decode(ids, skip_special_tokens=True) == text
        assert theirs.decode(theirs.encode(text, add_special_tokens=False)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)


def test_a_run_starts_with_the_folders_weights_and_its_balance_loss(runs, trained, folder, capsys):
    """Its first loss is what the trained model has, not ln(1024) = 6.93; α is the YAML's: the folder names none."""
    rest = ["optimizer.lr=1e-9", "optimizer.warmup_steps=1", "loss.balance_factor=0.01"]
    run = runs.run("continued", f"init_from={folder}", *rest)
    assert run.code == 0
    text = capsys.readouterr().out
    assert f"weights of {folder}; loss.balance=sequence, loss.balance_factor=0.01" in text
    first = run.scalars()["loss/main"][1][0]
    assert first < 6.4 and first < trained.scalars()["loss/main"][1][-1] + 0.3
    assert min(run.scalars()["loss/balance"][1]) > 0
    own, other = trained.weights(5), run.weights(5)
    for name, weight in own.items():
        if "expert_bias" not in name and weight.is_floating_point():
            torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-6)
    # With nothing to resume from, `auto` has started from the folder; a finished run doesn't need it any more.
    assert (runs.base / "runs/continued/tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()
    assert runs.run("continued", "init_from=/nope", *rest).code == 2
    assert "init_from" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["init_from=/nope"], "/nope/config.json: can't be read"),
        (["init_from=''"], 'init_from="": a path must not be empty'),
        (["model.hidden_size=128"], "model.hidden_size=128: init_from="),
        (["model.scoring_func=softmax"], "model.scoring_func=softmax: init_from="),
    ],
)
def test_a_start_that_can_not_be_meant_is_one_line(words, message, runs, folder, capsys):
    assert runs.run("refused", f"init_from={folder}", *words).code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (runs.base / "runs/refused").exists()


def test_two_processes_read_what_each_of_them_holds(runs, trained, folder):
    run = runs.command(
        "sharded", f"init_from={folder}", "strategy=fsdp2", "trainer.devices=2", "trainer.accelerator=cpu",
        "optimizer.lr=1e-9", "optimizer.warmup_steps=1", "trainer.max_steps=1", "callbacks.checkpoint.every_n_steps=1",
    )  # fmt: skip
    assert run.code == 0, run.output
    own, other = trained.weights(5), run.weights(1)
    assert own.keys() == other.keys()
    for name, weight in own.items():
        if "expert_bias" not in name and weight.is_floating_point():
            torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-6)


def test_another_mtp_depth_and_context_are_said(runs, folder, capsys):
    more = ["model.num_nextn_predict_layers=2", "model.max_position_embeddings=512", "trainer.max_steps=1"]
    assert runs.run("deeper", f"init_from={folder}", *more).code == 0
    text = capsys.readouterr().out
    assert f"model.num_nextn_predict_layers=2: {folder} has 1; the others start from random weights" in text
    assert f"model.max_position_embeddings=512: {folder} has 256" in text


def test_import_writes_a_config_that_starts_from_the_folder(runs, folder, capsys):
    target = runs.base / "again.yaml"
    assert main(["import", str(folder), "--out", str(target)]) == 0
    assert "all with a place; 713,728 parameters" in capsys.readouterr().out
    tree = compose([str(target)]).tree
    assert tree["init_from"] == str(folder) and tree["model"]["n_routed_experts"] == 16
    overrides = ["data.sequence_length=64", "trainer.max_steps=1", "run.name=again", "data.batch_size=8"]
    arguments = runs.arguments("again", tuple(overrides))
    assert main(["run", str(target), *arguments[2:]]) == 0
    assert main(["import", str(folder), "--out", str(target)]) == 2
    assert "already exists" in capsys.readouterr().err


def test_a_run_starts_from_the_best_checkpoint_and_with_the_tokenizer_of_another(runs, trained, capsys):
    rest = ["optimizer.lr=1e-9", "optimizer.warmup_steps=1", "trainer.max_steps=1", "callbacks.expert_bias.speed=0"]
    run = runs.run("from_run", f"init_from={trained.folder}", *rest, "callbacks.checkpoint.every_n_steps=1")
    assert run.code == 0
    (best,) = (trained.folder / "checkpoints").glob("best-*.ckpt")
    assert f"{trained.folder}: taken is {best.name}" in capsys.readouterr().out
    expected = torch.load(best, weights_only=True)["state_dict"]
    after = run.weights(1)
    for name in (name for name in expected if name.startswith("model.")):
        torch.testing.assert_close(after[name], expected[name], rtol=1e-4, atol=1e-6)
    assert (run.folder / "tokenizer.json").read_bytes() == (trained.folder / "tokenizer.json").read_bytes()
    refused = runs.run("refused", f"init_from={trained.folder}", "model.hidden_size=128")
    assert refused.code == 2
    assert f"model.hidden_size=128: init_from={trained.folder} has 64" in capsys.readouterr().err
    assert runs.run("refused", f"init_from={best}").code == 2
    error = capsys.readouterr().err
    assert "is a checkpoint; give its run's folder" in error and str(trained.folder) in error


def test_a_runs_weights_are_those_of_its_checkpoint_in_either_rotary_order(trained):
    source = RunWeights(trained.folder)
    source.audit()
    same, other = (empty_model(replace(source.config, rope_interleave=order)) for order in (
        source.config.rope_interleave, not source.config.rope_interleave))  # fmt: skip
    for model in (same, other):
        source.load_into(model, fill)
    saved = read_weights(source.checkpoint)
    assert saved.keys() == same.state_dict().keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in same.state_dict().items())
    tokens = torch.arange(60).reshape(2, 30)
    (ours, *_), (theirs, *_) = all_logits(same.eval(), tokens), all_logits(other.eval(), tokens)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_import_of_a_run_is_said_to_be_needless(trained, capsys):
    assert main(["import", str(trained.folder)]) == 2
    assert f"needs no import: init_from={trained.folder} starts another run" in capsys.readouterr().err


def test_a_runs_folder_stands_for_its_newest_checkpoint(trained, capsys):
    for action in ("inspect", "verify"):
        assert main(["checkpoint", action, str(trained.folder)]) == 0
        assert f"{trained.folder / 'checkpoints/step=5.ckpt'}" in capsys.readouterr().out


def test_a_consolidated_file_is_used_as_its_run_wherever_it_lies(trained, folder, tmp_path, capsys):
    """Config, tokenizer and report travel in the file; so they do when it is consolidated again."""
    inside, one, again = trained.folder / "checkpoints/step=5.ckpt", tmp_path / "a/one.ckpt", tmp_path / "b/again.ckpt"
    assert main(["checkpoint", "consolidate", str(inside), str(one)]) == 0
    assert main(["checkpoint", "consolidate", str(one), str(again)]) == 0
    for action in ("inspect", "verify"):
        assert main(["checkpoint", action, str(again)]) == 0
    capsys.readouterr()
    texts = []
    for word in (inside, one, again):
        assert main(["generate", str(word), "--prompt", "def ", "--temperature", "0", "--max-new-tokens", "20"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2] and texts[0].startswith("def ")
    for word, out in ((inside, "own"), (again, "out")):
        assert main(["export", str(word), str(tmp_path / out)]) == 0
    files = {path.name for path in (tmp_path / "own").iterdir()}
    assert files == {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in folder.iterdir()}
    for name in files:
        own, other = ((tmp_path / which / name).read_bytes() for which in ("own", "out"))
        assert own.replace(b"from `step=5.ckpt`", b"from `again.ckpt`") == other, name
    assert main(["needle", str(again), "--lengths", "64", "--depths", "1", "--texts", "1"]) == 0
    assert main(["placement", str(again), "--gpus", "4"]) == 0
    assert {path.name for path in again.parent.iterdir()} == {"again.ckpt", "needle", "placement"}


def test_a_checkpoint_outside_of_its_run_is_named_with_the_way_out(trained, tmp_path, capsys):
    copy = tmp_path / "copy.ckpt"
    copy.write_bytes((trained.folder / "checkpoints/step=5.ckpt").read_bytes())
    for words in (["generate", str(copy), "--prompt", "def "], ["export", str(copy), str(tmp_path / "out")]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert f"{copy}: is in no run's folder; dsv3 checkpoint consolidate" in error and error.count("\n") == 1
    assert main(["checkpoint", "consolidate", str(copy), str(tmp_path / "one.ckpt")]) == 0
    assert "has no tokenizer" in capsys.readouterr().out


def test_export_refuses_what_it_can_not_mean(runs, trained, capsys, tmp_path):
    for words, message in (
        (["/nope", "out"], "/nope: no such run folder"),
        ([str(trained.folder), "out", "--verify=/nope.npy"], "--verify /nope.npy: not a readable"),
        ([str(trained.folder), "out", "--file-gigabytes=0"], "argument --file-gigabytes"),
    ):
        assert main(["export", *words]) == 2
        assert message in capsys.readouterr().err
    np.save(tmp_path / "t.npy", np.array([[0, 1024]]))
    assert main(["export", str(trained.folder), "out", f"--verify={tmp_path / 't.npy'}"]) == 2
    assert "a token lies outside 0 to 1023" in capsys.readouterr().err


def test_tokens_that_can_not_be_used_are_one_line(trained, capsys, tmp_path):
    (tmp_path / "empty.npy").touch()
    np.savez(tmp_path / "several.npz", np.arange(4))
    np.save(tmp_path / "words.npy", np.array(["one"]))
    np.save(tmp_path / "real.npy", np.ones(4))
    for name, message in (
        ("empty.npy", "not a readable .npy file (EOF"),
        ("several.npz", "not a readable .npy file (the magic string"),
        ("words.npy", "must hold whole or real numbers, holds <U3"),
        ("real.npy", "must hold whole numbers [B, T], holds float64 [1, 4]"),
    ):
        file = tmp_path / name
        assert main(["export", str(trained.folder), str(tmp_path / "out"), f"--verify={file}"]) == 2
        assert f"--verify {file}: {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_where_the_logits_go_is_one_line(trained, capsys, tmp_path):
    (tmp_path / "verify").write_text("mine")
    assert main(["export", str(trained.folder), str(tmp_path / "out"), "--verify"]) == 2
    assert f"--verify {tmp_path / 'verify'}: must be a folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["verify"] and (tmp_path / "verify").read_text() == "mine"


def test_every_file_of_an_export_has_the_umasks_mode(folder):
    """The safetensors library closes its files to everyone but their owner."""
    (folder.parent / "plain").touch()
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert set(modes.values()) == {(folder.parent / "plain").stat().st_mode & 0o777}, modes


def test_an_import_that_can_not_be_written_is_one_line(folder, capsys, tmp_path):
    (tmp_path / "file").touch()
    out = tmp_path / "file/x.yaml"
    assert main(["import", str(folder), "--out", str(out)]) == 2
    assert f"{out}: can't be written (" in capsys.readouterr().err


def test_a_folder_is_continued_like_its_run(trained, folder, capsys):
    texts = []
    for word in (str(trained.folder / "checkpoints/step=5.ckpt"), str(folder)):
        assert main(["generate", word, "--prompt", "def ", "--temperature", "0", "--max-new-tokens", "20"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("def ")


def test_bfloat16_is_verified_against_weights_rounded_alike(trained, tmp_path, capsys):
    assert main(["export", str(trained.folder), str(tmp_path / "half"), "--dtype", "bfloat16", "--verify"]) == 0
    assert "from its own with weights rounded alike" in capsys.readouterr().out
