"""What the report recommends, and that it is made without a message that looks like an error."""

import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from dsv3_lightning.callbacks.run_report import markdown, next_command
from dsv3_lightning.common.history import scalar_history


def test_the_next_command_fits_what_was_learned():
    assert next_command(Path("runs/a b"), ["import os\n"], False) == (
        "`dsv3 generate 'runs/a b' --prompt 'import os'` continues a prompt"
    )
    assert next_command(Path("runs/x"), [], False).startswith("`dsv3 generate runs/x --prompt ")
    assert next_command(Path("runs/x"), ["def "], True) == "`dsv3 chat runs/x` talks with it"


def test_a_report_without_samples_has_no_empty_section(monkeypatch):
    class Anything(dict):
        def __missing__(self, key):
            return 0

    report = Anything(val_loss=None)
    assert "What it writes" not in markdown(report, Path("runs/x"), [], False, "`dsv3 chat runs/x` talks with it")
    text = markdown(report, Path("runs/x"), ["a text"], False, "next")
    assert "## What it writes\n\n```\na text\n```\n\n## Next\n\nnext; " in text


def test_the_curves_of_a_run_that_went_on_are_read_without_a_warning(tmp_path, caplog):
    """The first session came as far as step 5, the second one resumed after step 2."""
    for steps, purge in (((1, 2, 3, 4, 5), None), ((3, 4), 3)):
        writer = SummaryWriter(str(tmp_path), purge_step=purge)
        for step in steps:
            writer.add_scalar("loss/main", float(step), step)
        writer.close()
        time.sleep(1.1)  # TensorBoard orders the files of sessions by the second of their start
    with caplog.at_level("WARNING"):
        steps, _ = scalar_history(tmp_path)["loss/main"]
    assert steps[-2:] == [3, 4] and not caplog.records
