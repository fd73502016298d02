"""`dsv3 reproduce`: runs the experiments behind the papers' claims and writes a report with a verdict on each."""

import argparse
import platform
from collections.abc import Sequence
from pathlib import Path

from dsv3_lightning.common.files import write_file
from dsv3_lightning.common.flags import jobs_argument
from dsv3_lightning.common.paths import display_path, path_argument
from dsv3_lightning.common.plots import save_figure
from dsv3_lightning.config.overrides import text_override
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.runs.record import finished_below, read_report
from dsv3_lightning.studies import sweep
from dsv3_lightning.studies.claims import CLAIMS, EXPERIMENTS, LF, MISSING, SEEDS, judge
from dsv3_lightning.studies.compare import (
    SPEED,
    Finished,
    comparison,
    curves_by_group,
    find_runs,
    grouped,
    markdown_table,
)
from dsv3_lightning.studies.experiment import Experiment, find_experiment
from dsv3_lightning.studies.measured import Measured, read_measured
from dsv3_lightning.studies.sweep import refuse_other_settings

QUICK = ("trainer.max_steps=30", "trainer.val_check_interval=30", "trainer.limit_val_batches=8")
SCALE = (
    "The papers' models are hundreds of times larger and see a hundred thousand times as much text: what doesn't show "
    "at this scale may still hold at theirs, and a difference in loss below the spread means nothing."
)
METHOD = (
    "Each claim is an inequality, printed as the smaller side against the larger: means over seeds ± their standard "
    "deviation. Runs with the same seed see the same data in the same order, so the verdict is about their "
    f"differences: a one-sided Student's t-test at 5 % in either direction. Otherwise, or with fewer than {SEEDS} "
    "seeds, a claim is undecided. About one in twenty verdicts is due to chance. 'No number' marks claims for which "
    "the paper prints none: the verdict is about our inequality alone."
)
COLUMNS_MEAN = (
    "MaxVio global is (max - mean) / mean of the tokens per expert over the validation batches for each MoE layer, "
    f"averaged over the layers, as in {LF}; MaxVio batch is the same for a training batch, averaged over the last 50 "
    "steps. Specialization is the share of choices that text from another folder of the corpus would have made "
    "differently. cache/token is in numbers."
)
OTHERS = "The last rows of the table above are measured by commands of their own ([reinforce.md](reinforce.md)):"
Groups = dict[str, list[Finished]]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all runs")
    parser.add_argument(
        "--dir",
        type=path_argument,
        dest="folder",
        default="runs/reproduce",
        metavar="FOLDER",
        help="default %(default)s",
    )
    parser.add_argument(
        "--out", type=path_argument, metavar="FILE", help="the report; default: reproduction.md in that folder"
    )
    jobs_argument(parser)
    parser.add_argument("--quick", action="store_true", help="30 steps per run, to test that everything works")
    parser.add_argument(
        "--report", dest="report_only", action="store_true", help="run nothing; report the finished runs"
    )


def run(overrides: list[str], folder: Path, out: Path | None, jobs: int, quick: bool, report_only: bool) -> int:
    """Runs the unfinished runs below `folder` and writes the report of the finished ones. Returns 0 if no run failed.

    quick: a few steps only, to test that everything works. Raises ConfigError if there is nothing to report, or if the
    settings of a run differ from those of the command that the report would print.
    """

    code, words = 0, [*(QUICK if quick else ()), *overrides]
    for name in () if report_only else EXPERIMENTS:
        code |= sweep.run([name, *words, text_override("run.dir", str(folder))], jobs, None, False)
    experiments = {name: groups for name in EXPERIMENTS if (groups := finished_runs(folder, name))}
    if not experiments:
        raise ConfigError(f"{folder}: holds no finished run of {', '.join(EXPERIMENTS)}")
    for name in experiments:
        for task in Experiment(name, [*words, f"run.dir={folder}"]).tasks():
            if read_report(folder / name / task.name) is not None:
                refuse_other_settings(task)
    path = out or folder / "reproduction.md"
    pictures = path.with_suffix("")
    for name, groups in experiments.items():  # speeds of concurrent runs mean nothing
        save_figure(curves_by_group(groups, leave_out=(SPEED,)), pictures / f"{name}.png", dpi=70)
    write_file(path, report(experiments, words, pictures.name, read_measured(folder)))
    print(f"report: {display_path(path)}")
    return code


def finished_runs(folder: Path, name: str) -> Groups:
    """The finished runs of an experiment by variant, in the order of its file."""
    if not finished_below(folder / name):
        return {}
    groups = grouped(find_runs([folder / name]))
    return {variant: groups[variant] for variant in Experiment(name, []).plan.variants if variant in groups}


def report(experiments: dict[str, Groups], overrides: list[str], pictures: str, measured: Sequence[Measured]) -> str:
    """The text of docs/reproduction.md: a row per claim, then each experiment's table, curves and command.

    measured: claims that other commands have measured in folders beside the experiments'.
    """
    rows = [["claim", "source", "published", "ours", "verdict"]]
    for claim in CLAIMS:
        ours, verdict = judge(claim, experiments.get(claim.experiment, {}))
        rows.append([claim.text, claim.source, claim.published, ours if verdict != MISSING else "-", f"**{verdict}**"])
    rows += [one.row() for one in measured]
    settings = "".join(f" {override}" for override in overrides)
    quick = set(QUICK) <= set(overrides)
    some = next(run for groups in experiments.values() for runs in groups.values() for run in runs)
    parts = [
        "# Which of the papers' claims hold at this scale\n",
        f"Made by `dsv3 reproduce --jobs 2{settings}`{'' if settings else ', or `make reproduce`,'} on "
        f"{some.report['device']} ({platform.system()}), torch {some.report['versions']['torch']}. {SCALE}\n",
        *(
            ["**These runs have only a few steps, to test that everything works. Their verdicts mean nothing.**\n"]
            if quick
            else []
        ),
        f"{METHOD}\n",
        markdown_table(rows, left=len(rows[0])),
        f"{COLUMNS_MEAN}\n",
    ]
    for name, groups in experiments.items():
        parts += section(name, groups, settings, pictures)
    if measured:
        commands = {(one.command, one.date, one.device): None for one in measured}
        parts += ["## Other commands\n", OTHERS + "\n"]
        parts += [f"- `{command}`, {date}, on {device}" for command, date, device in commands]
        parts[-1] += "\n"
    return "\n".join(parts)


def section(name: str, groups: Groups, settings: str, pictures: str) -> list[str]:
    facts = next(iter(groups.values()))[0].report
    steps, each = facts["steps"], facts["tokens"] // facts["steps"]
    plan, finished = Experiment(name, []).plan, sum(len(runs) for runs in groups.values())
    planned = len(plan.variants) * len(plan.seeds)
    missing = f" {finished} of {planned} runs are finished." if finished < planned else ""
    return [
        f"## {name}\n",
        f"{question(name)}\n",
        f"`dsv3 sweep {name} --jobs 2{settings}`: {steps:,} steps of {each:,} tokens per run.{missing}\n",
        markdown_table(comparison(groups, leave_out=("tokens/s",))),
        f"![curves of {name}; bands are the range over seeds]({pictures}/{name}.png)\n",
    ]


def question(name: str) -> str:
    """The first comment of an experiment's file, as prose."""
    lines = find_experiment(name).read_text(encoding="utf-8").splitlines()
    comment = [line[1:].strip() for line in lines[: next(n for n, line in enumerate(lines) if line[:1] != "#")]]
    return " ".join(line for line in comment if not line.startswith("Run:"))
