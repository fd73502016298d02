"""Files of tasks, their few-shot examples, and mistakes in them."""

import json
from pathlib import Path

import pytest

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.evaluation.tasks import find_tasks, read_task

OPTION = {"context": "The cat sat on the", "continuations": [" mat.", " idea."], "label": 0}
QUESTION = {"prompt": "2 + 3 =", "answer": "5"}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_a_file_of_ones_own_needs_no_settings(tmp_path: Path):
    task = read_task(write(tmp_path / "cats.v1.jsonl", OPTION, "", OPTION | {"label": 1}))
    assert (task.name, task.kind, [sample.gold for sample in task.samples]) == ("cats", "options", [" mat.", " idea."])
    assert [sample.number for sample in task.samples] == [1, 3]  # lines of the file, for the reader


def test_settings_come_from_the_first_line_and_flags_replace_them(tmp_path: Path):
    first = {"task": "sums", "checker": "integer", "shots": 1, "stop": "\n", "protocol": "aime"}
    path = write(tmp_path / "x.jsonl", first, QUESTION, QUESTION)
    settings = read_task(path, shots=0, protocol=None).settings
    assert (settings.task, settings.shots, settings.protocol, settings.stop) == ("sums", 0, "aime", ("\n",))


def test_a_single_stop_text_is_not_its_letters(tmp_path: Path):
    path = write(tmp_path / "x.jsonl", {"task": "x", "stop": "Question:"}, QUESTION)
    assert read_task(path).settings.stop == ("Question:",)


def test_examples_are_never_the_question_and_do_not_depend_on_a_limit(tmp_path: Path):
    questions = [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(6)]
    task = read_task(write(tmp_path / "x.jsonl", {"task": "x", "shots": 5}, *questions))
    for sample in task.samples:
        shots = task.shots_of(sample, seed=1)
        assert len({shot.number for shot in shots} - {sample.number}) == 5
        assert shots == task.shots_of(sample, seed=1)
    assert len({tuple(task.shots_of(task.samples[0], seed)) for seed in range(20)}) > 10


def test_examples_may_be_lines_of_their_own(tmp_path: Path):
    lines = [QUESTION, *({"prompt": f"{i} + 0 =", "answer": str(i), "example": True} for i in range(3))]
    task = read_task(write(tmp_path / "x.jsonl", {"task": "x", "shots": 3}, *lines))
    assert len(task.samples) == 1 and {shot.gold for shot in task.shots_of(task.samples[0], 1)} == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], ":1: not JSON: "),
        (["[]"], r":1: not an object but \[\]"),
        ([], "holds no question"),
        ([{"task": "x"}], "holds no question"),
        ([{"task": "x", "checkers": "text"}, QUESTION], ":1: checkers: no such setting; did you mean checker?"),
        ([{"task": "x", "shots": -1}, QUESTION], ":1: shots=-1: must be a whole number of at least 0"),
        ([{"task": "x", "shots": True}, QUESTION], "shots=true: must be"),
        ([{"task": "x", "stop": [""]}, QUESTION], "stop=.*must be a list of texts"),
        ([{"task": "x", "protocol": "aimee"}, QUESTION], "protocol 'aimee': no such protocol; did you mean aime?"),
        ([{"task": "x", "checker": "tex"}, QUESTION], ":2: checker 'tex': no such checker"),
        ([{"task": "x", "checker": "integer"}, QUESTION | {"answer": "five"}], ":2: answer 'five': is not an integer"),
        ([QUESTION | {"answer": ""}], ":1: answer .*: must not be empty"),
        ([QUESTION | {"answer": []}], ":1: answer .*: must not be empty"),
        ([QUESTION | {"answer": 5}], ":1: answer=5: must be text"),
        ([{"answer": "5"}], ":1: prompt=null: must be text"),
        ([OPTION | {"label": 2}], ":1: label=2: must be the number of an option, from 0 to 1"),
        ([OPTION | {"label": True}], "label=true"),
        ([OPTION | {"continuations": ["a"]}], "continuations=.*at least two"),
        ([OPTION | {"continuations": ["a", ""]}], "continuations=.*empty"),
        ([OPTION | {"continuations": ["a", "a"]}], "two options are equal"),
        ([OPTION, QUESTION], "mixes questions"),
        ([{"task": "x", "shots": 2}, QUESTION, QUESTION], "shots=2: there are 1 questions for examples"),
    ],
)
def test_a_mistake_is_one_line_with_file_and_line(tmp_path: Path, lines: list[object], message: str):
    with pytest.raises(ConfigError, match=message) as raised:
        read_task(write(tmp_path / "bad.jsonl", *lines))
    assert "bad.jsonl" in str(raised.value) or "protocol" in str(raised.value)


def test_tasks_are_found_by_path_or_by_name_in_the_folder(tmp_path: Path):
    file = write(tmp_path / "sums.jsonl", QUESTION)
    assert [task.name for task in find_tasks([str(file)], tmp_path / "none")] == ["sums"]
    assert [task.name for task in find_tasks(["sums"], tmp_path)] == ["sums"]
    with pytest.raises(ConfigError, match="task sum: no such file, nor .*; did you mean sums?"):
        find_tasks(["sum"], tmp_path)
    with pytest.raises(ConfigError, match="`dsv3 eval fetch` brings public ones"):
        find_tasks(["sum"], tmp_path / "none")
    with pytest.raises(ConfigError, match="task sums: given twice"):
        find_tasks(["sums", str(file)], tmp_path)
