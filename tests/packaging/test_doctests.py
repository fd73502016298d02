"""The examples in docstrings say what is so."""

import doctest
import importlib
import importlib.util
import pkgutil

import dsv3_lightning

EXTRAS = {"dsv3_lightning.inference.harness": "lm_eval"}  # modules that can't be imported without a library of an extra


def test_examples_in_docstrings_hold():
    names = [module.name for module in pkgutil.walk_packages(dsv3_lightning.__path__, "dsv3_lightning.")]
    assert "dsv3_lightning.training.metrics" in names and "dsv3_lightning.callbacks.progress" in names
    absent = {name for name, library in EXTRAS.items() if importlib.util.find_spec(library) is None}
    names = [name for name in names if not name.endswith("__main__") and name not in absent]
    modules = [importlib.import_module(name) for name in names]
    results = {module.__name__: doctest.testmod(module) for module in modules}
    assert [name for name, result in results.items() if result.failed] == []
    assert all(results[f"dsv3_lightning.{name}"].attempted for name in ("training.metrics", "callbacks.progress"))
