"""The figures of lm-evaluation-harness, by every way into it: python benchmarks/harness.py MODEL [--questions N]

MODEL: a run's folder, a checkpoint or a Hugging Face folder. Needs pip install 'dsv3-lightning[serve,harness]' and,
for the harness's own `hf`, transformers, accelerate and peft.

Three tasks made from the installed Python's sources (ranked options, generation and log-probabilities of whole texts)
run through `simple_evaluate` with our model (`HarnessModel`), with `local-completions` and `local-chat-completions`
against a real server, and with `hf` on the exported folder. Every answer is compared; the process fails where two
log-probabilities differ by more than 1e-4, or a greedy flag or a text differs.

--record FILE: also writes one request of each kind that the harness sent.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("OPENAI_API_KEY", "none")

from dsv3_lightning import load
from dsv3_lightning.cli import main as cli
from dsv3_lightning.inference.batching import Engine

TOLERANCE = 1e-4
NEW = 12
RANKED = """
task: ranked
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{context}}"
doc_to_target: "{{label}}"
doc_to_choice: "{{options}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITTEN = """
task: written
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: generate_until
test_split: test
doc_to_text: "{{prompt}}"
doc_to_target: "{{continuation}}"
generation_kwargs: {until: ["\\n\\n", "return"], max_gen_toks: NEW, do_sample: false}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
"""


def write_tasks(folder: Path, questions: int) -> None:
    """Task files and their data: lines of the standard library with the line that follows and three from elsewhere."""
    sources = sorted(Path(os.__file__).parent.glob("*.py"))
    lines = [line for path in sources for line in path.read_text("utf-8").splitlines() if 20 < len(line) < 90]
    stride = len(lines) // (4 * questions)
    rows = []
    for number in range(questions):
        first = number * 4 * stride
        size = 1 + number % 5  # batches of mixed lengths
        options = [f"\n{lines[(first + size + k * stride) % len(lines)]}" for k in range(4)]
        label = number % 4
        options[0], options[label] = options[label], options[0]
        context = "\n".join(lines[first : first + size])
        rows.append({
            "context": context + (" " if number % 7 == 0 else ""), "options": options, "label": label,
            "prompt": context, "continuation": options[label], "text": "\n".join(lines[first : first + 12]),
        })  # fmt: skip
    rows[0]["context"] = ""  # the harness puts its prefix token there; it sends no empty prompt
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    for name, text in (("ranked", RANKED), ("written", WRITTEN), ("rolling", ROLLING)):
        filled = text.replace("FILE", str(folder / "data.jsonl")).replace("NEW", str(NEW))
        (folder / f"{name}.yaml").write_text(filled, "utf-8")


def answers(model: Any, folder: Path, tasks: list[str], **options: Any) -> dict[str, list[Any]]:
    """By task, each document's answers as the model gave them."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    began = time.perf_counter()
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=True,
        verbosity="ERROR",
        **options,
    )
    print(f"  {', '.join(tasks)}: {time.perf_counter() - began:.1f} s", flush=True)
    for task in tasks:
        shown = {name: value for name, value in results["results"][task].items() if isinstance(value, float)}
        print(
            f"  {task}: " + ", ".join(f"{name.split(',')[0]} {value:.4f}" for name, value in shown.items()), flush=True
        )
    samples = {task: sorted(results["samples"][task], key=lambda sample: sample["doc_id"]) for task in tasks}
    return {task: [flat(sample["resps"]) for sample in samples[task]] for task in tasks}


def flat(responses: Any) -> list[Any]:
    """(log-probability, greedy) pairs, numbers or texts."""
    return [response[0] if isinstance(response, list) else response for response in responses]


def compare(name: str, task: str, ours: list[Any], theirs: list[Any]) -> bool:
    """Prints the largest difference; True if it is within the tolerance and nothing else differs."""
    most, other, count = 0.0, 0, 0
    for mine, yours in zip(ours, theirs, strict=True):
        for a, b in zip(mine, yours, strict=True):
            count += 1
            if isinstance(a, str):
                other += a != b
                continue
            (p, greedy), (q, their_greedy) = (x if isinstance(x, (tuple, list)) else (x, None) for x in (a, b))
            most = max(most, abs(float(p) - float(q)))
            other += str(greedy) != str(their_greedy)
    print(f"{name}, {task}: {count} answers, largest difference {most:.1e}, {other} differ otherwise", flush=True)
    return most <= TOLERANCE and not other


class Recorder:
    """ASGI middleware that keeps the first body of each kind of request."""

    def __init__(self, app: Any) -> None:
        self.app, self.found = app, {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return

        async def heard() -> Any:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body"):
                body = json.loads(message["body"])
                kind = {"/tokenize": "tokenize", "/detokenize": "detokenize", "/v1/chat/completions": "chat"}.get(
                    scope["path"], "loglikelihood" if body.get("echo") else "generate_until"
                )
                self.found.setdefault(kind, body)
            return message

        await self.app(scope, heard, send)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--record", type=Path)
    given = parser.parse_args()
    import uvicorn

    from dsv3_lightning.inference.harness import HarnessModel
    from dsv3_lightning.inference.server.app import build_app

    model, tokenizer = load(given.model)
    limit = model.config.max_position_embeddings
    tasks = ["ranked", "written", "rolling"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_tasks(folder, given.questions)
        print("our model, without begin tokens, as local-completions asks", flush=True)
        plain = answers(HarnessModel(model, tokenizer, add_bos_token=False, max_length=limit - 2), folder, tasks)
        print("our model", flush=True)
        ours = answers(HarnessModel(model, tokenizer), folder, tasks)

        engine = Engine(model, tokenizer, 16, 64, 300.0)
        app = Recorder(build_app(engine, tokenizer, "served"))
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        common = {"model": "served", "max_length": limit, "max_retries": 1, "max_gen_toks": NEW}
        url = f"http://127.0.0.1:{port}/v1/completions"
        served = {}
        for size in (1, 8):
            print(f"local-completions, batches of {size}", flush=True)
            options = common | {"base_url": url, "batch_size": size, "custom_prefix_token_id": tokenizer.bos_id}
            served[size] = answers("local-completions", folder, tasks, model_args=options)
        print("local-chat-completions", flush=True)
        chat_url = url.replace("/v1/completions", "/v1/chat/completions")
        chat = answers("local-chat-completions", folder, ["written"], model_args=common | {"base_url": chat_url},
                       apply_chat_template=True)  # fmt: skip
        ours_chat = answers(HarnessModel(model, tokenizer), folder, ["written"], apply_chat_template=True)
        server.should_exit = True
        thread.join()
        engine.close()
        print("transformers, through the harness's hf", flush=True)
        exported = Path(given.model)
        if not (exported / "config.json").is_file():
            exported = folder / "exported"
            if cli(["export", given.model, str(exported)]):
                return 1
        common = {"pretrained": str(exported), "dtype": "float32", "device": "cpu", "batch_size": 8}
        theirs = answers("hf", folder, tasks[:2], model_args=common | {"max_length": limit})
        # with begin tokens it scores that of a text after the one in front of the text
        theirs |= answers("hf", folder, tasks[2:], model_args=common | {"max_length": limit, "add_bos_token": False})
        print()
        right = [compare(f"local-completions, {size} at a time", task, plain[task], served[size][task])
                 for size in served for task in tasks]  # fmt: skip
        right.append(compare("local-chat-completions", "written", ours_chat["written"], chat["written"]))
        right += [compare("hf", task, ours[task], theirs[task]) for task in tasks]
        if given.record:
            given.record.write_text(json.dumps(app.found, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
