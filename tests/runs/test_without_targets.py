"""Long questions with short answers: most batches have nothing to learn, and a mean over nothing is absent."""

import json
import math
from pathlib import Path

from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check
from dsv3_lightning.data.batches.module import TextDataModule
from tests.conftest import Nano, Run

STEPS = 12


def short_answers(nano: Nano, tmp_path: Path) -> Run:
    question = "Is it so that {} is a number that can be reported from the others by looking at it for long enough? "
    with open(tmp_path / "talks.jsonl", "w") as file:
        for number in range(60):
            asked = {"role": "user", "content": "".join(question.format(number * n) for n in range(5))}
            file.write(json.dumps({"messages": [asked, {"role": "assistant", "content": "yes"}]}) + "\n")
    return nano.run(
        "talks", f"data.paths=[{tmp_path}/talks.jsonl]", "data.text_key=messages", "data.sequence_length=32",
        "data.batch_size=2", "data.validation_fraction=0.25",
        "data.mask_document_ends=true", "data.isolate_documents=true", "loss.balance=none",
        "callbacks.balance_factor=null", f"trainer.max_steps={STEPS}", "trainer.val_check_interval=6",
        "trainer.limit_val_batches=1", "callbacks.weight_average={decay: 0.5}",
    )  # fmt: skip


def strict(text: str) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_steps_and_validations_without_a_target_have_no_mean_and_no_gradient(
    nano: Nano, tmp_path: Path, capsys
) -> None:
    run = short_answers(nano, tmp_path)
    assert run.code == 0
    config = check(compose([str(run.folder / "config.yaml")]).tree)
    data = TextDataModule(config.data, config.model.mtp_depth, STEPS)
    data.prepare_data()
    data.setup("fit")
    targets = [(batch["targets"] != -100).sum((0, 2)).tolist() for batch in data.train_dataloader()]
    validated = (next(iter(data.val_dataloader()))["targets"] != -100).sum()
    learned = {step for step, counts in enumerate(targets, 1) if counts[0]}
    assert learned and len(learned) < STEPS - 3 and validated == 0  # both kinds of step are there

    scalars = run.scalars()
    assert set(scalars["loss/main"][0]) == learned
    assert set(scalars["loss/mtp_1"][0]) == {step for step, counts in enumerate(targets, 1) if counts[1]}
    norms = dict(zip(*scalars["optimizer/grad_norm"]))
    assert all((norms[step] > 0) == bool(sum(counts)) for step, counts in enumerate(targets, 1))
    assert not {"val/loss", "val/bpb", "val/mtp_1", "val/loss_average", "mtp/acceptance_1"} & scalars.keys()
    assert all(math.isfinite(value) for _, values in scalars.values() for value in values)

    report = strict((run.folder / "report.json").read_text())
    assert report["val_loss"] is report["val_bpb"] is None and report["mtp_acceptance"] == [None]
    assert "nan" not in (run.folder / "report.md").read_text().lower().replace("nano", "")
    assert not list((run.folder / "checkpoints").glob("best*"))
    printed = capsys.readouterr().out
    assert "loss nan" not in printed and "validation after step 12:" in printed
