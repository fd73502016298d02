"""A run's folder is a record: a refusal changes nothing in it, and a run resumes when what it started from is gone."""

import hashlib
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsv3_lightning.cli import main
from tests.conftest import Nano, Run

STEPS = ("trainer.max_steps=4", "callbacks.checkpoint.every_n_steps=2", "callbacks.checkpoint.keep_best=0")
SETTINGS = (*STEPS, "trainer.limit_val_batches=1", "data.validation_fraction=0.5")


def content(folder: Path) -> dict[str, str]:
    """Every file but the lock, by path, with a hash of its bytes."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Trained(Nano):
    """A run of four steps on texts of its own; each test has a copy of its folder."""

    def settings(self, *more: str) -> tuple[str, ...]:
        return (f"data.paths=[{self.base / 'texts'}]", f"data.cache_dir={self.base / 'cache'}", *SETTINGS, *more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data_cache: list[str]) -> Path:
    base = tmp_path_factory.mktemp("record")
    shutil.copytree(data_cache[0].split("[")[1].split(",")[0], base / "texts")
    trained = Trained(base, ["trainer.precision=32", "callbacks.sample_text=null"])
    assert trained.run("x", *trained.settings()).code == 0
    return base


def test_the_size_of_a_checkpoint_is_known_before_the_first_one(finished):
    from dsv3_lightning.config.compose import compose
    from dsv3_lightning.config.schema import check
    from dsv3_lightning.planning.memory import checkpoint_bytes

    size = (finished / "runs/x/checkpoints/step=4.ckpt").stat().st_size
    names = 200_000  # of nano's tensors, their places and the settings; the same for larger tensors
    assert 0 < size - checkpoint_bytes(check(compose(["nano"]).tree).model, "32", False, 4, copies=0) < names


def test_a_run_whose_checkpoint_does_not_fit_the_disk_is_refused_and_a_disk_that_gets_full_told(
    finished, tmp_path, capsys, monkeypatch
):
    trained = Trained(finished, ["trainer.precision=32", "callbacks.sample_text=null", f"run.dir={tmp_path}"])
    free = SimpleNamespace(free=8_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    assert trained.run("full", *trained.settings()).code == 2
    error = capsys.readouterr().err
    assert "full/checkpoints: a checkpoint takes about 0.01 GB, but 0.01 GB are free; make room" in error
    assert error.splitlines()[-1].startswith("dsv3: error: ") and not (tmp_path / "full").exists()
    free.free = 20_000_000  # two are kept, and a third is written beside them
    assert trained.run("filling", *trained.settings("trainer.max_steps=1")).code == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "the disk will be full" in line]
    assert len(told) == 1 and "2 of about 0.01 GB are kept and one more is written beside them" in told[0]


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Trained:
    """Stopped after step 2 of 4, with the texts, the prepared data and the run's folder below a folder of its own."""
    shutil.copytree(finished, tmp_path / "all", symlinks=True)
    stopped = tmp_path / "all/runs/x"
    for name in ("report.json", "report.md", "checkpoints/step=4.ckpt", "checkpoints/last.ckpt"):
        (stopped / name).unlink()
    return Trained(tmp_path / "all", ["trainer.precision=32", "callbacks.sample_text=null"])


@pytest.mark.parametrize("at_the_end", [False, True])
@pytest.mark.parametrize("what", ["text", "tokenizer"])
def test_other_data_are_refused_and_nothing_changes(finished, run, capsys, what: str, at_the_end: bool):
    """Also where only the last validation and the report are missing."""
    folder = run.base / "runs/x"
    if at_the_end:
        shutil.copy(finished / "runs/x/checkpoints/step=4.ckpt", folder / "checkpoints")
    more = ()
    if what == "text":
        with open(run.base / "texts/ast.py", "a") as file:
            file.write("# more\n")
    else:
        other = run.base / "other"
        shutil.copytree(next(path.parent for path in (run.base / "cache").glob("*/tokenizer.json")), other)
        text = (other / "tokenizer.json").read_text(encoding="utf-8")
        (other / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
        more = (f"data.tokenizer={other}",)
    before, cache = content(folder), content(run.base / "cache")
    capsys.readouterr()
    assert run.run("x", *run.settings(*more)).code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    named = "ast.py changed" if what == "text" else "the tokenizer is another"
    assert named in error and "choose another run.name" in error
    assert content(folder) == before and content(run.base / "cache") == cache


def test_a_run_resumes_without_its_texts(finished, run, capsys):
    expected = Run(finished / "runs/x", 0).weights(4)
    shutil.rmtree(run.base / "texts")
    (run.base / "runs/x/checkpoints/step=4.ckpt.new").mkdir()  # of a session that was killed
    (run.base / "runs/x/.report.md.abc.new").mkdir()
    again = run.run("x", *run.settings())
    assert again.code == 0 and "are used" in capsys.readouterr().err
    assert all((value == expected[name]).all() for name, value in again.weights(4).items())
    assert not [path.name for path in again.folder.rglob("*") if path.name.endswith(".new")]


def test_a_run_resumes_with_its_texts_and_its_folder_elsewhere(finished, run, capsys):
    expected = Run(finished / "runs/x", 0).weights(4)
    run.base.rename(run.base.with_name("moved"))
    run.base = run.base.with_name("moved")
    (run.base / "elsewhere").mkdir()
    (run.base / "texts").rename(run.base / "elsewhere/texts")
    again = run.run("x", *run.settings(f"data.paths=[{run.base / 'elsewhere/texts'}]"))
    assert again.code == 0 and "continuing after step 2" in capsys.readouterr().out
    assert all((value == expected[name]).all() for name, value in again.weights(4).items())


def test_repeated_preparation_says_why(run, capsys):
    with open(run.base / "texts/calendar.py", "a") as file:
        file.write("# more\n")
    assert main(["prepare", "nano", *run.settings("run.name=y")]) == 0
    assert "prepared again, since " in (said := capsys.readouterr().err) and "calendar.py changed" in said
    assert main(["prepare", "nano", *run.settings("run.name=y", "data.validation_fraction=0.25")]) == 0
    assert "validation_fraction: 0.5 before, 0.25 now" in capsys.readouterr().err


@pytest.fixture
def small_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failed_write_is_one_line_and_the_previous_checkpoint_stays(run, capsys, small_files):
    size, name = 1000 << 10, "checkpoints/step=4.ckpt"
    folder = run.base / "runs/x"
    before = content(folder / "checkpoints")
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    capsys.readouterr()
    assert run.run("x", *run.settings()).code == 2
    message = f"dsv3: error: {folder / name}: can't be written (File too large)\n"
    assert [line for line in capsys.readouterr().err.splitlines(True) if not line.startswith("data: ")] == [message]
    assert content(folder / "checkpoints").items() >= before.items()
    assert not [path.name for path in folder.rglob("*") if path.name.endswith(".new")]
