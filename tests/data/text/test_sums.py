"""The sums of `make assistant`: rewards and the evaluation never meet a sum whose answer was shown."""

import json

from dsv3_lightning.data.text.sums import sums, write


def test_each_stage_has_sums_of_its_own_and_every_answer_is_right(tmp_path):
    counts = write(tmp_path)
    files = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in counts
    }
    told = [line.split("=") for text in files["text"] for line in text["text"].splitlines()]
    talks = [[message["content"] for message in line["messages"]] for line in files["talks"]]
    asked = [(line["messages"][0]["content"], line["answer"]) for line in files["prompts"]]
    held_out = [(line["prompt"], line["answer"]) for line in files["task"][1:]]
    found = [tuple(pair) for stage in (told, talks, asked, held_out) for pair in stage]
    assert len(found) == len({question for question, _ in found}) == 10000 and dict(found) == dict(sums())
    for question, answer in found:
        a, b = question.split("+")
        assert int(answer[::-1]) == int(a) + int(b)
