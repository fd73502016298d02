"""From finished runs to verdicts: what is claimed exists, what is decided follows from the seeds."""

import json

import pytest
from torch.utils.tensorboard import SummaryWriter

from dsv3_lightning.cli import main
from dsv3_lightning.config.compose import to_yaml
from dsv3_lightning.config.schema import to_tree
from dsv3_lightning.studies import reproduce as command
from dsv3_lightning.studies.claims import CLAIMS, EXPERIMENTS, MISSING, NOT, REPRODUCED, UNDECIDED, verdict
from dsv3_lightning.studies.compare import COLUMNS
from dsv3_lightning.studies.experiment import Experiment
from dsv3_lightning.studies.measured import Measured, write_measured
from tests.conftest import ROOT

REPORT = json.loads("""{"steps": 240, "tokens": 983040, "val_loss": 4.5, "val_bpb": 1.8, "max_vio_global": [0.1, 0.3],
  "max_vio_batch": 0.5, "specialization": [0.2], "mtp_acceptance": [], "tokens_per_second": 77777.0, "parameters": 10,
  "active_parameters": 3, "device": "1 x cpu", "versions": {"torch": "2.13.0"}}""")


def finish(tmp_path, experiment: str, changes: dict[str, dict[int, dict]], *overrides: str) -> None:
    """A folder for each run that `changes` names, by variant and seed, as if it had run with these overrides."""
    for task in Experiment(experiment, [*overrides, f"run.dir={tmp_path}"]).tasks():
        variant, _, seed = task.name.rpartition("-seed")
        if int(seed) in changes.get(variant, {}):
            folder = tmp_path / experiment / task.name
            folder.mkdir(parents=True)
            (folder / "config.yaml").write_text(to_yaml(to_tree(task.config)))
            (folder / "report.json").write_text(json.dumps(REPORT | changes[variant][int(seed)]))
            with SummaryWriter(str(folder)) as writer:
                for step in (120, 240):
                    writer.add_scalar("val/loss", REPORT["val_loss"] + 1 / step, step)


def row(text: str, claim: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {claim}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_verdicts_by_students_t():
    # mean and standard deviation are 1: t = sqrt(3) with three seeds, below 2.920; more than sqrt(12) with twelve
    assert verdict([0.0, 1.0, 2.0]) == UNDECIDED and verdict([0.0, 1.0, 2.0] * 4) == REPRODUCED
    assert verdict([0.7, 1.0, 1.3]) == REPRODUCED and verdict([-0.7, -1.0, -1.3]) == NOT
    assert verdict([1.0, 1.0]) == UNDECIDED and verdict([]) == MISSING


@pytest.mark.slow
def test_verdicts_compare_runs_of_one_seed(tmp_path, capsys):
    # The seeds differ by 0.5, the variants in every seed by 0.01: unpaired, nothing would be decided.
    losses = {1: 4.0, 2: 4.5, 3: 5.0}
    finish(tmp_path, "balance", {
        "none": {seed: {"max_vio_global": [3.0, 5.0 + seed / 10]} for seed in losses},
        "loss_free": {seed: {"val_loss": loss, "max_vio_global": [0.05, 0.09]} for seed, loss in losses.items()},
        "sequence": {seed: {"val_loss": loss + 0.01 + seed / 1000} for seed, loss in losses.items()},
        "batch": {1: {}},
    }, "optimizer.lr=1e-3")  # fmt: skip
    sides = {"low": 0.1, "high": [0.3, 0.35, 0.25], "form": "{:.2f}"}
    made = {"command": "python benchmarks/x.py", "date": "2026-01-02", "device": "1 x cpu"}
    write_measured(tmp_path / "other", [Measured("It learns", "a paper", "no number", **sides, **made)])
    out = tmp_path / "docs/report.md"
    assert main(["reproduce", "--dir", str(tmp_path), "--report", "--out", str(out), "optimizer.lr=1e-3"]) == 0
    assert capsys.readouterr().out == f"report: {out}\n"
    text = out.read_text()
    assert row(text, "The bias alone balances")[3:] == ["0.07 against 0.10", f"**{REPRODUCED}**"]
    assert row(text, "It is at least 4 times lower")[3:] == ["0.07 against 4.10 ± 0.05", f"**{REPRODUCED}**"]
    assert row(text, "The bias costs less loss")[3:] == ["4.500 ± 0.500 against 4.512 ± 0.501", f"**{REPRODUCED}**"]
    assert row(text, "A batch-wise loss costs less")[4] == f"**{UNDECIDED}**"  # one seed
    assert row(text, "Predicting one more token")[3:] == ["-", f"**{MISSING}**"]
    assert "`dsv3 sweep balance --jobs 2 optimizer.lr=1e-3`: 240 steps of 4,096 tokens per run." in text
    assert row(text, "It learns")[1:] == ["a paper", "no number", "0.10 against 0.30 ± 0.05", f"**{REPRODUCED}**"]
    assert "- `python benchmarks/x.py`, 2026-01-02, on 1 x cpu\n" in text
    assert "10 of 18 runs are finished." in text and text.index("| none | 3") < text.index("| loss_free | 3")
    assert "Does loss-free balancing balance" in text and "## mtp" not in text
    assert "Their verdicts mean nothing" not in text
    assert "77,777" not in text  # speeds of runs at the same time say nothing
    assert (tmp_path / "docs/report/balance.png").stat().st_size > 5_000 and "(report/balance.png)" in text


@pytest.mark.slow
def test_all_experiments_are_swept_and_a_failure_is_reported(tmp_path, monkeypatch):
    calls = []
    finish(tmp_path, "moe", {"fine_grained": {1: {}}}, *command.QUICK, "data.batch_size=8")

    def sweep(words, jobs, task, slurm):
        calls.append((words, jobs))
        return int(words[0] == "moe")

    monkeypatch.setattr("dsv3_lightning.studies.sweep.run", sweep)
    assert main(["reproduce", "--quick", "--jobs", "2", "--dir", str(tmp_path), "data.batch_size=8"]) == 1
    assert [words[0] for words, _ in calls] == list(EXPERIMENTS) and {jobs for _, jobs in calls} == {2}
    assert calls[0][0][1:] == [*command.QUICK, "data.batch_size=8", f"run.dir={tmp_path}"]
    text = (tmp_path / "reproduction.md").read_text()  # of what there is
    assert "Their verdicts mean nothing" in text and "`make reproduce`" not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made_with", "words", "reported"),
    [
        ([], ["optimizer.lr=1e-3"], "optimizer.lr: 0.003 there, 0.001 here"),
        (["optimizer.lr=1e-3"], [], "optimizer.lr: 0.001 there, 0.003 here"),
        ([], ["--quick"], "trainer.max_steps: 160 there, 30 here"),
    ],
)
def test_a_command_that_did_not_make_the_runs_is_not_printed_as_theirs(tmp_path, capsys, made_with, words, reported):
    finish(tmp_path, "moe", {"gshard_like": {2: {}}}, *made_with)
    assert main(["reproduce", "--report", "--dir", str(tmp_path), *words]) == 2
    err = capsys.readouterr().err
    assert "moe/gshard_like-seed2: was run with other settings" in err and reported in err and err.count("\n") == 1
    assert not (tmp_path / "reproduction.md").exists()


@pytest.mark.slow
def test_a_report_writes_nothing_beside_the_runs(tmp_path):
    finish(tmp_path, "moe", {"gshard_like": {2: {}}})
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert main(["reproduce", "--report", "--dir", str(tmp_path), "--out", str(tmp_path / "out/report.md")]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} | {tmp_path: 0} == before | {tmp_path: 0}


def test_nothing_to_report_is_said(tmp_path, capsys):
    assert main(["reproduce", "--report", "--dir", str(tmp_path)]) == 2
    assert "holds no finished run of balance, bias_speed" in capsys.readouterr().err


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """What each experiment's file holds, by its name."""
    folder = tmp_path_factory.mktemp("runs")
    return {name: Experiment(name, [f"run.dir={folder}"]).plan for name in EXPERIMENTS}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.text)
def test_what_a_claim_compares_exists(plans, claim):
    plan = plans[claim.experiment]
    assert claim.column in COLUMNS and claim.experiment in EXPERIMENTS and len(plan.seeds) >= 3
    assert {side for side in (claim.low, claim.high) if isinstance(side, str)} <= plan.variants.keys()


def test_every_variant_is_in_a_verdict(plans):
    """But for the report's own mixture and the limit to a single group, of which no paper says anything."""
    judged = {(claim.experiment, side) for claim in CLAIMS for side in (claim.low, claim.high)}
    left = {(name, variant) for name, plan in plans.items() for variant in plan.variants} - judged
    assert left == {("balance", "loss_free_and_sequence"), ("routing", "sigmoid_1_of_4_groups")}


def test_every_shipped_experiment_is_run():
    assert {path.stem for path in (ROOT / "configs/experiments").glob("*.yaml")} == set(EXPERIMENTS)
