"""A run on named sources: losses and experts by source, in curves and in the report."""

import pytest

from dsv3_lightning.callbacks.dashboard import layout
from tests.conftest import MODULES, Nano


def test_a_run_reports_every_source(nano: Nano) -> None:
    paths = nano.common[0].removeprefix("data.paths=[").removesuffix("]").split(",")
    assert len(paths) == 2 < len(MODULES)
    sources = f"{{first: {{paths: ['{paths[0]}'], weight: 3}}, second: {{paths: ['{paths[1]}'], weight: 1}}}}"
    given = [
        f"data.sources={sources}", "data.paths=[]", "data.weights_schedule=[{step: 2, weights: {second: 3}}]",
        "trainer.max_steps=4", "trainer.val_check_interval=2", "data.sequence_length=64",
        "data.validation_fraction=0.5",
    ]  # fmt: skip
    run = nano.run("mixed", *given)
    assert run.code == 0
    report = run.report()
    assert list(report["sources"]) == ["first", "second"] and len(report["specialization"]) > 0
    one, other = report["sources"].values()
    low, high = sorted((one["val_bpb"], other["val_bpb"]))
    assert low < report["val_bpb"] < high and {"val_loss", "gzip_bpb", "xz_stream_bpb", "passes"} <= one.keys()
    assert one["xz_bpb"] > one["xz_stream_bpb"] > 1 and one["gzip_bpb"] >= one["gzip_stream_bpb"]
    scalars = run.scalars()
    for name in report["sources"]:
        assert scalars[f"sources/bpb_{name}"][0] == scalars["val/bpb"][0]
        assert scalars[f"sources/loss_{name}"][1][-1] == pytest.approx(report["sources"][name]["val_loss"], rel=1e-6)
    assert "## By source" in (run.folder / "report.md").read_text(encoding="utf-8")
    tree = {"data": {"sources": {"a": {}}}, "loss": {"balance": "none"}, "model": {"num_nextn_predict_layers": 0}}
    charts = layout({**tree, "callbacks": {}}, origins=2)["is it learning"]
    assert "bits per byte of validation text by source" in charts
