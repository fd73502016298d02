"""Pairs and prompts: ids, targets of every head, columns for rewards, and lines that are refused."""

import json

import numpy as np
import pytest

from dsv3_lightning.data.batches.dataset import IGNORE
from dsv3_lightning.data.batches.sampling import MicroBatch
from dsv3_lightning.data.text.tokenizer import ASSISTANT, USER, Tokenizer
from dsv3_lightning.data.tuning.datasets import PairDataset, count_targets, rows_of
from dsv3_lightning.data.tuning.lines import parse
from dsv3_lightning.data.tuning.prepare import prepare_lines, read_split
from dsv3_lightning.errors import ConfigError

TOKENIZER = Tokenizer.train(["a b"], 300)


def test_a_prompt_is_text_that_goes_on_or_a_conversation_that_is_answered():
    begin = TOKENIZER.decode([TOKENIZER.bos_id])
    plain = parse(json.dumps({"prompt": "1 + 1 =", "answer": "2", "level": 3}), TOKENIZER, pairs=False)
    assert TOKENIZER.decode(plain.prompt) == f"{begin}1 + 1 =" and plain.shown == "1 + 1 ="
    assert plain.columns == {"answer": "2", "level": 3}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    for name in ("prompt", "messages"):
        talk = parse(json.dumps({name: messages}), TOKENIZER, pairs=False)
        assert TOKENIZER.decode(talk.prompt) == f"{begin}Be brief.{USER}1 + 1?{ASSISTANT}" and talk.shown == messages
    answered = parse(json.dumps({"messages": [*messages, {"role": "assistant", "content": "2"}]}), TOKENIZER, False)
    assert answered == talk._replace(columns={"answer": "2"})


def test_an_answer_ends_with_the_end_token_unless_it_was_cut():
    line = {"prompt": "x", "chosen": "ab", "rejected": [{"role": "assistant", "content": "cd"}], "rejected_ends": False}
    pair = parse(json.dumps(line), TOKENIZER, pairs=True)
    end = [TOKENIZER.eos_id]
    assert pair.answers == [TOKENIZER.encode("ab") + end, TOKENIZER.encode("cd")] and pair.columns == {}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ({"text": "x"}, "must have either prompt or messages; the line has text"),
        ({"prompt": "x", "messages": []}, "must have either prompt or messages"),
        ({"messages": "x"}, 'messages="x": must be a list of messages'),
        ({"prompt": 3}, "prompt=3: must be text or a list of messages"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "prompt: must end with a message of the user"),
        ({"prompt": "x", "chosen": "a"}, "rejected: is missing; must be text"),
        ({"prompt": "x", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ({"prompt": "x", "chosen": "a", "rejected": None}, "rejected: is null; must be text"),
        ({"prompt": "x", "chosen": "", "rejected": "a", "chosen_ends": False}, "chosen: is empty"),
        ({"prompt": "x", "chosen": "b", "rejected": "a", "rejected_ends": 0}, "rejected_ends=0: must be true or false"),
        ({"prompt": "x", "chosen": "b", "rejected": "a", "completions": 1}, "completions: is a name that reward"),
        ([1], "not an object but [1]"),
    ],
)
def test_a_line_that_cannot_be_used_says_why(line, why):
    with pytest.raises(ConfigError) as error:
        parse(json.dumps(line), TOKENIZER, pairs=True)
    assert why in str(error.value)


@pytest.fixture
def pairs(tmp_path, make_config):
    lines = [{"prompt": f"{n}", "chosen": "ab" * n, "rejected": "c"} for n in range(1, 13)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    TOKENIZER.save(tmp_path)
    return make_config(tmp_path, paths=[str(tmp_path / "pairs.jsonl")], tokenizer=str(tmp_path), sequence_length=24)


def test_targets_are_the_answers_tokens_and_mtp_learns_from_chosen_ones_alone(pairs):
    lines = read_split(prepare_lines(pairs, True, 0, None, list().append), "train")
    batch = PairDataset(lines, 2, TOKENIZER.pad_id)[MicroBatch(np.array([0, -1, 2]), np.array([0, 2]))]
    P, T = batch["targets"].shape[1:]
    assert P == 3 and batch["tokens"].shape == (6, T + 3)
    for row, (number, answer) in enumerate([(0, 1), (None, 1), (2, 1), (0, 2), (None, 2), (2, 2)]):
        parts = [[], [], []] if number is None else [part.tolist() for part in lines.parts(number)]
        whole, begin = parts[0] + parts[answer], len(parts[0])
        for head in range(P):
            for place in range(T):
                predicted = place + 1 + head
                wanted = number is not None and begin <= predicted < len(whole) and (head == 0 or answer == 1)
                assert int(batch["targets"][row, head, place]) == (whole[predicted] if wanted else IGNORE)
    assert batch["target_counts"].tolist() == (batch["targets"] != IGNORE).sum((0, 2)).tolist()


def test_the_count_of_targets_is_that_of_the_rows():
    prompts, answers = [np.arange(1), np.arange(3)], [np.arange(4), np.arange(1)]
    found = (rows_of(prompts, answers, 2, 0)["targets"] != IGNORE).sum((0, 2))
    assert count_targets(prompts, answers, 2).tolist() == found.tolist() == [5, 4, 3]


def test_long_pairs_are_left_out_and_counted_and_the_same_inputs_are_prepared_once(pairs):
    told: list[str] = []
    folder = prepare_lines(pairs, True, 0, None, told.append)
    assert told == ["data: left out: 2 pairs of more than 25 tokens (data.sequence_length=24)"]
    counts = [len(read_split(folder, split).shown) for split in ("train", "validation")]
    assert sum(counts) == 10 and min(counts) > 0
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert prepare_lines(pairs, True, 0, None, told.append) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == before
