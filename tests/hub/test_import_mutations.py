"""Damaged folders end an import in one line, or don't matter; `benchmarks/import_mutations.py` tries many more."""

from benchmarks.import_mutations import run


def test_no_damage_to_a_folder_is_a_traceback_or_leaves_something_behind():
    assert run(count=60, seed=7, first=0) == []
