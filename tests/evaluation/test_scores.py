"""Scores of a small model: options against its own logits, protocols, planted answers, and statistics by hand."""

import itertools
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch

from dsv3_lightning.cli import main
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.evaluation import writers
from dsv3_lightning.evaluation.evaluate import evaluate, results_table
from dsv3_lightning.evaluation.requests import Pair, fit, fit_prompt, pair_ids
from dsv3_lightning.evaluation.statistics import estimate, majority, pass_at
from dsv3_lightning.evaluation.tasks import read_task
from dsv3_lightning.evaluation.writers import cached_writer, called_writer
from dsv3_lightning.inference.scoring import score
from tests.evaluation.test_tasks import write
from tests.hub.folders import biased
from tests.model.small import small_config

OPTIONS = [
    {"context": "The cat sat", "continuations": [" on a mat", " up", " quickly over there"], "label": 0},
    {"context": "def f(x):\n    return ", "continuations": ["x", "y + 日本"], "label": 1, "unconditional": "return "},
]
AIME = [
    {"prompt": f"What is {a} times {b}? Put it in \\boxed{{}}.", "answer": str(a * b)} for a in (3, 7) for b in (2, 5)
]
MATH = [
    {"prompt": "Half of root eight?", "answer": r"\sqrt{2}", "gold": r"It is $\boxed{\sqrt{2}}$."},
    {"prompt": "A third?", "answer": r"\frac{1}{3}"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["def f(x):\n    return x + y\n", "The cat sat on a mat, \\boxed{12} 日本"] * 3, 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.set_num_threads(1)
    return biased(small_config(vocab_size=tokenizer.vocab_size, max_position_embeddings=64))


def run(model, tokenizer, task, writer=cached_writer, **options):
    return evaluate(task, tokenizer, partial(score, model), writer(model, tokenizer, 1), 64, **options)


def log_p(model, tokenizer, context, continuation):
    """By one forward pass over the whole text, in nats."""
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(context + continuation)]])
    count = 1 + len(tokenizer.encode(context))
    with torch.no_grad():
        steps = torch.cat([model(ids[:, :n], torch.tensor([n - 1])) for n in range(count, ids.shape[1])])
    return float(steps.double().log_softmax(-1).gather(1, ids[0, count:, None]).sum())


def test_options_are_ranked_by_each_measure_as_the_models_own_logits_rank_them(model, tokenizer, tmp_path):
    result = run(model, tokenizer, read_task(write(tmp_path / "x.jsonl", *OPTIONS)))
    for answer, given in zip(result.answers, OPTIONS):
        bare = given.get("unconditional", "Answer:")
        for option, text in zip(answer["options"], given["continuations"]):
            assert option["log_p"] == pytest.approx(log_p(model, tokenizer, given["context"].rstrip(" "), (
                " " if given["context"].endswith(" ") else "") + text), abs=1e-4)  # fmt: skip
            assert option["log_p_unconditional"] == pytest.approx(log_p(model, tokenizer, bare.rstrip(" "), (
                " " if bare.endswith(" ") else "") + text), abs=1e-4)  # fmt: skip
        scores = [option["log_p"] for option in answer["options"]]
        lengths = [len(text.encode()) for text in given["continuations"]]
        assert answer["chosen"]["raw"] == [scores.index(max(scores))]
        by_byte = [one / length for one, length in zip(scores, lengths)]
        assert answer["chosen"]["per_byte"] == [by_byte.index(max(by_byte))]
        label = given["label"]
        assert answer["bits_per_byte"] == pytest.approx(-scores[label] / lengths[label] / math.log(2))
    assert next(iter(result.metrics)) == "gold_bits_per_byte"
    raw = sum(answer["label"] in answer["chosen"]["raw"] for answer in result.answers) / 2
    assert result.metrics["accuracy_raw"].value == raw
    assert result.metrics["chance"].value == pytest.approx((1 / 3 + 1 / 2) / 2)
    centered = (raw - 5 / 12) / (7 / 12)
    assert result.metrics["centered_raw"].value == pytest.approx(centered)
    assert "gold bits per byte" in results_table([result])


def test_the_same_text_after_different_contexts_is_ranked_by_its_own_likelihood(model, tokenizer, tmp_path):
    line = {"contexts": ["The cat sat", "def f(x):"], "continuation": " on a mat", "label": 1}
    example = {"contexts": ["x + y is", "up is"], "continuation": " quick", "label": 0, "example": True}
    for shots in (0, 1):
        task = read_task(write(tmp_path / "x.jsonl", {"task": "x", "shots": shots}, line, example))
        ((answer,), metrics) = (result := run(model, tokenizer, task)).answers, result.metrics
        before = "x + y is quick\n\n" * shots
        scores = [log_p(model, tokenizer, before + context, " on a mat") for context in line["contexts"]]
        for option, context, expected in zip(answer["options"], line["contexts"], scores, strict=True):
            assert option["context"] == context and option["log_p"] == pytest.approx(expected, abs=1e-4)
        assert metrics["accuracy_raw"].value == float(scores[1] > scores[0]) == metrics["accuracy_per_byte"].value
        assert answer["bits_per_byte"] == pytest.approx(-scores[1] / 9 / math.log(2))


def test_aime_style_and_math_questions_run_by_their_papers_protocols(model, tokenizer, tmp_path):
    pytest.importorskip("math_verify")
    aime = read_task(write(tmp_path / "aime.jsonl", {"task": "aime", "checker": "integer", "protocol": "aime"}, *AIME))
    math = read_task(write(tmp_path / "m.jsonl", {"task": "m", "checker": "math", "protocol": "math-500"}, *MATH))
    results = [run(model, tokenizer, task) for task in (aime, math)]
    assert [[len(answer["answers"]) for answer in result.answers] for result in results] == [[16] * 4, [1] * 2]
    assert len({one["text"] for one in results[0].answers[0]["answers"]}) > 8  # sampled, each from its own stream
    for result in results:
        assert result.metrics["pass@1"].value == 0
        assert sum(result.metrics[name].value for name in ("right", "wrong", "unreadable")) == pytest.approx(1)
    assert {"pass@16", "majority@16", "spread_of_runs"} <= set(results[0].metrics)
    assert "4 x 16" in results_table(results)


def test_planted_answers_are_all_right(model, tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("math_verify")

    def planted(model, prompts, max_new, sampling, end_ids, seed, on_token, unused, numbers):
        """Writes a right answer, and after its end what must not be read."""
        texts = []
        for place, number in enumerate(numbers):
            answer = golds[number >> 32]
            ids = tokenizer.encode(f"\\boxed{{{answer}}}\nQuestion: and \\boxed{{999}}")
            texts.append([])
            for token in ids:
                texts[-1].append(token)
                if on_token(place, token):
                    break
        return texts

    monkeypatch.setattr(writers, "decode", planted)
    for name, checker, lines in (("aime", "integer", AIME), ("math-500", "math", MATH)):
        first = {"task": name, "checker": checker, "protocol": name, "stop": ["\nQuestion:"]}
        task = read_task(write(tmp_path / "x.jsonl", first, *lines))
        golds = {sample.number: sample.answers[0] for sample in task.samples}
        metrics = run(model, tokenizer, task).metrics
        assert metrics["pass@1"].value == metrics["right"].value == 1 and metrics["never_ended"].value == 0
        if name == "aime":
            assert (
                metrics["pass@16"].value == metrics["majority@16"].value == 1 and metrics["spread_of_runs"].value == 0
            )


@pytest.mark.parametrize("protocol", ["greedy", "r1"])
def test_an_answer_depends_on_seed_line_and_number_alone(model, tokenizer, tmp_path, protocol, monkeypatch):
    first = {"task": "x", "checker": "integer", "protocol": protocol, "max_new_tokens": 6}
    task = read_task(write(tmp_path / "x.jsonl", first, *AIME))
    whole = run(model, tokenizer, task, repeats=3)
    assert run(model, tokenizer, task, repeats=3, limit=2).answers == whole.answers[:2]
    fewer = run(model, tokenizer, task, repeats=2)
    assert [row["answers"] for row in fewer.answers] == [row["answers"][:2] for row in whole.answers]
    monkeypatch.setattr(writers, "ROWS", 1)
    assert run(model, tokenizer, task, repeats=3).answers == whole.answers
    with torch.no_grad():
        assert run(model, tokenizer, task, called_writer, repeats=3).answers == whole.answers


def test_a_text_that_reaches_the_limit_never_ended(model, tokenizer, tmp_path):
    task = read_task(write(tmp_path / "x.jsonl", {"task": "x", "protocol": "repetition", "max_new_tokens": 5}, *AIME))
    result = run(model, tokenizer, task)
    assert result.metrics["never_ended"].value == sum(one["answers"][0]["tokens"] == 5 for one in result.answers) / 4
    stopped = read_task(write(tmp_path / "x.jsonl", {"task": "x", "max_new_tokens": 5, "stop": "\\"}, *AIME))
    assert all("\\" not in one["answers"][0]["text"] for one in run(model, tokenizer, stopped).answers)


def test_programs_are_measured_and_not_generated(model, tokenizer, tmp_path):
    task = read_task(write(tmp_path / "x.jsonl", {"task": "x", "protocol": "bits"}, *AIME))
    result = run(model, tokenizer, task, writer=lambda *_: lambda requests: [1 / 0 for _ in requests])
    assert list(result.metrics) == ["gold_bits_per_byte"] and not result.answers[0]["answers"]
    text = AIME[0]["prompt"]
    expected = -log_p(model, tokenizer, text, " " + AIME[0]["answer"]) / math.log(2) / len(" " + AIME[0]["answer"])
    assert result.answers[0]["bits_per_byte"] == pytest.approx(expected, abs=1e-4)
    assert "x" in results_table([result])


def test_a_context_is_split_where_its_own_tokens_end_and_keeps_its_end(tokenizer):
    pair = pair_ids(tokenizer, "The cat ", "sat")
    assert pair.context == [tokenizer.bos_id, *tokenizer.encode("The cat")]
    assert pair.context[1:] + pair.continuation == tokenizer.encode("The cat sat")
    assert pair_ids(tokenizer, "", "sat") == Pair([tokenizer.bos_id], tokenizer.encode("sat"))
    assert fit(Pair([0, 1, 2, 3], [4, 5]), 4) == Pair([0, 2, 3], [4, 5], True)
    assert fit(Pair([0, 1, 2, 3], [4]), 4) == Pair([0, 1, 2, 3], [4])
    assert fit_prompt([0, 1, 2, 3, 4], 6, 2) == ([0, 2, 3, 4], True)
    assert fit_prompt([0, 1], 6, 100) == ([0, 1], False)


def test_pass_at_k_is_the_mean_over_all_choices_of_k_answers():
    for right in itertools.product([0, 1], repeat=5):
        for k in (1, 2, 4, 5):
            chosen = [max(some) for some in itertools.combinations(right, k)]
            assert pass_at(k, 5, sum(right)) == pytest.approx(sum(chosen) / len(chosen))


def test_the_majority_decides_and_what_can_not_be_read_does_not_vote():
    assert majority(["4", "4", "5"], [True, True, False]) == 1
    assert majority([None, None, "5"], [False, False, True]) == 1
    assert majority([None, None], [False, False]) == 0
    assert majority(["4", "5", None], [True, False, False]) == 0.5


def test_the_standard_error_is_that_of_a_mean_over_questions():
    assert estimate([1, 0, 0, 1, 1]).error == pytest.approx(math.sqrt(0.6 * 0.4 / 4))  # s² = n p q / (n - 1)
    assert math.isnan(estimate([1]).error)


@pytest.mark.slow
def test_the_verb_writes_a_table_numbers_and_every_answer(model, tokenizer, tmp_path, capsys, monkeypatch):
    from tests.hub.folders import exported

    folder = exported(model, tmp_path / "model")
    tokenizer.save(folder)
    write(tmp_path / "options.jsonl", {"task": "options", "shots": 1}, *OPTIONS)
    write(
        tmp_path / "aime.jsonl", {"task": "aime", "checker": "integer", "protocol": "aime", "max_new_tokens": 4}, *AIME
    )
    words = ["evaluate", str(folder), "--tasks", str(tmp_path / "options.jsonl"), "aime", "--folder", str(tmp_path)]
    assert main([*words, "--out", str(tmp_path / "out"), "--limit", "2", "--repeats", "3"]) == 0
    shown = capsys.readouterr().out
    assert "gold bits per byte" in shown and "2 x 3" in shown and "options" in shown
    results = json.loads((tmp_path / "out/results.json").read_text())["tasks"]
    assert results["aime"]["metrics"]["pass@1"]["value"] == 0 and results["options"]["samples"] == 2
    lines = Path(tmp_path / "out/answers/aime.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["answers"]) for line in lines] == [3, 3]
    assert main([*words[:3], "nothing"]) == 2
    assert "task nothing: no such file" in capsys.readouterr().err
