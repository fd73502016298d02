"""The examples in docstrings say what is so."""

import doctest
import importlib
import pkgutil

import dsv3_lightning


def test_examples_in_docstrings_hold():
    names = [module.name for module in pkgutil.walk_packages(dsv3_lightning.__path__, "dsv3_lightning.")]
    assert "dsv3_lightning.training.metrics" in names and "dsv3_lightning.callbacks.progress" in names
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    results = {module.__name__: doctest.testmod(module) for module in modules}
    assert [name for name, result in results.items() if result.failed] == []
    assert all(results[f"dsv3_lightning.{name}"].attempted for name in ("training.metrics", "callbacks.progress"))
