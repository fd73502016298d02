"""The command line: help without torch, one-line errors, exit codes, and names in any script under any locale."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_lightning import cli

WITHOUT_TORCH = """
import contextlib, io, sys
from dsv3_lightning.cli import main
for words in {words}:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        assert main(words) == 0, words
heavy = {{"torch", "lightning", "numpy", "transformers", "rich"}} & set(sys.modules)
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""


def dsv3(*words: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "dsv3_lightning", *words]
    return subprocess.run(command, capture_output=True, env=os.environ | environment, check=False)


def test_a_closed_pipe_ends_it_quietly():
    """As `| head -1` leaves it."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "dsv3_lightning", "plan", "v3"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("words", [["--help"], ["plan", "--help"], ["run", "nano", "--print-config"]])
def test_a_full_disk_behind_the_standard_output_is_one_line(words: list[str]):
    command = [sys.executable, "-m", "dsv3_lightning", *words]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    message = "dsv3: error: standard output: can't be written (No space left on device)\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_help_plan_and_print_config_import_no_torch():
    words = [["--help"], *([verb, "--help"] for verb in cli.VERBS), ["plan", "v3"], ["run", "nano", "--print-config"]]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH.format(words=words)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_studies_load_no_torch():
    """`compare` reads JSON and `sweep` starts processes."""
    code = "import dsv3_lightning.studies.compare, dsv3_lightning.studies.sweep, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_of_run_says_what_intervals_count_and_where_the_settings_are(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "count optimizer steps" in text and "dsv3 run laptop" in text
    (base,) = [word for word in text.split() if word.endswith("base.yaml")]
    assert Path(base).is_file()


def test_the_options_are_these_and_no_more(capsys: pytest.CaptureFixture[str]):
    """A new one should be seen in review."""
    options = {}
    for name, verb in cli.VERBS.items():
        parser = cli.Parser(name, "", "")
        importlib.import_module(verb.module).arguments(parser)
        options[name] = " ".join(flag for action in parser._actions for flag in action.option_strings or [action.dest])
    config = "-h --help words --print-config"
    sampling = "--max-new-tokens --temperature --top-k --top-p --min-p --stop --seed"
    assert options == {
        "prepare": f"{config} --jobs --shard --keep-dropped",
        "data": "-h --help action path --split --source --documents --sample --characters",
        "run": config,
        "validate": config,
        "generate": f"-h --help checkpoint --prompt --parse-special --draft --weights {sampling}",
        "sample": "-h --help checkpoint prompts out --reward --threshold --samples --keep --temperature"
        " --max-new-tokens --seed --reward-seconds --pairs",
        "evaluate": "-h --help checkpoint --tasks --folder --protocol --repeats --shots --max-new-tokens --limit --seed"
        " --out",
        "eval": "-h --help action names --folder --wheel --count --seed",
        "chat": f"-h --help checkpoint --system --context --weights {sampling}",
        "serve": "-h --help checkpoint --name --host --port --slots --context --max-waiting --timeout"
        " --body-megabytes --api-key --cors-origin --threads",
        "export": "-h --help run out --dtype --verify --file-gigabytes",
        "import": "-h --help folder --out",
        "trace": "-h --help run --step --png",
        "placement": "-h --help run --gpus --nodes --replicas --loads --out",
        "demo-corpus": "-h --help folder",
        "needle": "-h --help run --lengths --depths --texts --out",
        "plan": f"{config} --gpus --gpu --inside --between --fp8 --dry-run --sources "
        "--pipeline-parallel --schedule --micro-batches --overlap --times --png",
        "sweep": "-h --help words --jobs --task --slurm",
        "reproduce": "-h --help overrides --dir --out --jobs --quick --report",
        "compare": "-h --help runs --markdown --plot --equal",
        "checkpoint": "-h --help action path output",
        "doctor": "-h --help --node",
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run", "nano", "model.hiden_size=3"], "model.hiden_size: no such key; did you mean model.hidden_size?"),
        (["run", "nano", "optimizer.lr=-1e-4"], "optimizer.lr=-0.0001: must be above 0"),
        (["run", "optimizer.lr=1"], "no config named; give a file or a preset, such as laptop"),
        (["run", "nano", "--print-confg"], "unrecognized arguments: --print-confg (see dsv3 run --help)"),
        (["generate", "x"], "the following arguments are required: --prompt (see dsv3 generate --help)"),
        (
            ["generate", "x", "--prompt", "p", "--seed", "a"],
            "argument --seed: 'a' must be a whole number from 0 to 2^63 - 1 (see dsv3 generate --help)",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(words) == 2
    assert capsys.readouterr() == ("", f"dsv3: error: {expected}\n")


def test_an_unknown_verb_and_none(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["rnu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dsv3: error: argument VERB: invalid choice: 'rnu'") and error.count("\n") == 1
    assert cli.main([]) == 2
    assert "verbs:" in capsys.readouterr().err


def test_a_multi_line_error_becomes_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def stop(**_):
        raise cli.ConfigError("one\ntwo")

    monkeypatch.setattr("dsv3_lightning.commands.validate.run", stop)
    assert cli.main(["validate", "nano"]) == 2
    assert capsys.readouterr().err == "dsv3: error: one two\n"


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch):
    def interrupt(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dsv3_lightning.commands.validate.run", interrupt)
    assert cli.main(["validate", "nano"]) == 130


def test_a_run_gets_settings_tree_and_files(monkeypatch: pytest.MonkeyPatch):
    got = []
    monkeypatch.setattr("dsv3_lightning.runs.fit.fit", lambda *given: got.append(given) or 7)
    assert cli.main(["run", "run.seed=5", "nano", "trainer.max_steps=1e1"]) == 7
    ((config, tree, files),) = got
    assert (config.run.seed, tree["run"]["seed"], tree["trainer"]["max_steps"]) == (5, 5, 10)
    assert [file.name for file in files] == ["base.yaml", "nano.yaml"]


def test_generate_gets_its_arguments_by_name(monkeypatch: pytest.MonkeyPatch):
    got = []
    monkeypatch.setattr("dsv3_lightning.commands.generate.run", lambda **given: got.append(given) or 0)
    assert cli.main(["generate", "runs/nano", "--prompt", "def ", "--temperature", "0"]) == 0
    sampling = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "stop": [], "seed": 1}
    assert got == [
        {
            "checkpoint": Path("runs/nano").absolute(),
            "prompt": ["def "],
            "parse_special": False,
            "draft": 0,
            "weights": "fp32",
            "max_new_tokens": 128,
        }
        | sampling
    ]


def test_print_config_shows_what_is_in_force(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["run", "nano", "--print-config", "trainer.max_steps=1e1", "optimizer.lr=1E-3"]) == 0
    text = capsys.readouterr().out
    assert "max_steps: 10\n" in text and "lr: 0.001\n" in text and "rope_theta: 10000.0\n" in text


def test_plan_shows_the_published_numbers(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["plan", "v3"]) == 0
    text = capsys.readouterr().out
    for number in ("671,026,404,352", "37,552,282,624", "11,610,067,968", "250.4 GFLOP", "260.6 GFLOP", "14.8 T"):
        assert number in text


def test_validate_says_ok_and_what_is_wrong(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["validate", "nano"]) == 0
    assert capsys.readouterr().out == "ok: nano, 713,728 parameters, 310,400 active per token\n"
    assert cli.main(["validate", "nano", "callbacks.checkpoint.every_step=3"]) == 2
    message = "callbacks.checkpoint.every_step: no such key; did you mean callbacks.checkpoint.every_n_steps?"
    assert capsys.readouterr().err == f"dsv3: error: {message}\n"


def test_an_ascii_locale_changes_nothing(tmp_path: Path):
    """Names in other scripts on the command line, in a file's name and inside; found with LC_ALL=C and no coercion."""
    file = tmp_path / "ü b.yaml"
    file.write_text("# a dash \u2014\ndefaults: [nano]\nrun: {name: 实验}\n", encoding="utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = dsv3("run", str(file), "data.paths=[数据/ü b.txt]", "--print-config", **ascii_only)
    assert done.returncode == 0, done.stderr
    for text in ("name: 实验", "/数据/ü b.txt"):
        assert text in done.stdout.decode()
    done = dsv3("run", "数.yaml", **ascii_only)
    assert (done.returncode, done.stderr.decode().startswith("dsv3: error: 数.yaml: no such file")) == (2, True)


@pytest.mark.parametrize("words", [["run", "job"], ["run", "mmt"], ["login"], []])
def test_lightnings_other_words_go_to_the_sdk(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning", *words])
    monkeypatch.setitem(sys.modules, "lightning_sdk", None)  # not installed
    assert cli.lightning_main() == 2
    assert capsys.readouterr().err.count("\n") == 1
    entry = type(sys)("entrypoint")
    entry.main_cli = lambda: calls.append(sys.argv)
    calls: list[list[str]] = []
    for name, module in {"lightning_sdk": type(sys)("a"), "lightning_sdk.cli": type(sys)("b")}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "lightning_sdk.cli.entrypoint", entry)
    assert cli.lightning_main() == 0
    assert calls == [["lightning", *words]]


def test_lightning_run_is_ours_and_leaves_argv_alone(monkeypatch: pytest.MonkeyPatch, capsys):
    argv = ["lightning", "run", "nano", "--print-config"]
    monkeypatch.setattr(sys, "argv", argv)
    assert cli.lightning_main() == 0
    assert "name: nano" in capsys.readouterr().out
    assert sys.argv is argv and argv == ["lightning", "run", "nano", "--print-config"]


def test_doctor_tells_about_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dsv3_lightning.training.precision.measure_gemm", lambda dtype, device: 2e9)
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for part in ("python ", "torch ", "cores ", "memory ", "matrix products", "script `lightning`", "can be written"):
        assert part in text
    assert list(tmp_path.iterdir()) == []
