"""The wheel alone, in an environment of its own and far from the checkout, has code, callbacks, configs and scripts."""

import importlib.util
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PARTS = ("pyproject.toml", "README.md", "LICENSE", "dsv3_lightning", "callbacks", "configs")


def run(*command: str | Path, cwd: Path) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout gets no build folder. Without network."""
    folder = tmp_path_factory.mktemp("wheel")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / "source" / part, symlinks=True)
        elif (ROOT / part).exists():
            (folder / "source").mkdir(exist_ok=True)
            shutil.copy(ROOT / part, folder / "source" / part)
    flags = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", folder / "source", *flags, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel. It borrows the dependencies of this one, but not its link to the checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    spec = importlib.util.find_spec("omegaconf")
    assert spec is not None and spec.origin is not None
    (packages,) = folder.glob("lib/python*/site-packages")
    # Folders listed in a .pth are searched, but their own .pth files, such as an editable install's, are not read.
    (packages / "borrowed.pth").write_text(str(Path(spec.origin).parents[1]), encoding="utf-8")
    flags = ("--no-deps", "--no-index", "--ignore-installed")  # or the checkout's installation would do
    run(folder / "bin" / "python", "-m", "pip", "install", *flags, wheel, cwd=folder)
    return folder


def test_the_wheel_holds_each_file_once(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    for name in ("py.typed", "callbacks/expert_bias.py", "configs/base.yaml", "configs/laptop.yaml", "model/config.py"):
        assert f"dsv3_lightning/{name}" in names
    assert {name.split("/")[0].split("-")[0] for name in names} <= {"dsv3_lightning"}  # no top-level `callbacks`


def test_help_and_a_config_check_run_from_the_wheel(environment: Path, tmp_path: Path):
    python = environment / "bin" / "python"
    where = run(python, "-c", "import dsv3_lightning.callbacks as it; print(it.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(environment)
    assert "verbs:" in run(environment / "bin" / "dsv3", "--help", cwd=tmp_path)
    assert run(environment / "bin" / "dsv3", "validate", "nano", cwd=tmp_path).startswith("ok: nano, ")
    assert "name: laptop" in run(environment / "bin" / "lightning", "run", "laptop", "--print-config", cwd=tmp_path)
