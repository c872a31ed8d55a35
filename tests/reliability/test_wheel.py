"""The wheel holds the packages and their data, nothing else, and works away from the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command, **kwargs) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools would leave build/ in the checkout, and take stale files from it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("mbrl", "world_models", "planners", "experiments", "benchmarks", "tests"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    # No isolation and no dependencies: the test needs no network.
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index",
        "--wheel-dir", out, source)  # fmt: skip
    (path,) = out.glob("*.whl")
    return path


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {name for name in ("mbrl", "world_models", "planners") if (ROOT / name).is_dir()}
    # Every module and table of the checkout: a subpackage that pyproject does not list is lost silently.
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in top
        for pattern in ("*.py", "*.csv")
        for path in (ROOT / package).rglob(pattern)
    }
    assert expected <= set(names), f"not in the wheel: {sorted(expected - set(names))}"
    assert any(name.startswith("mbrl/data/") and name.endswith(".csv") for name in names)
    assert wheel.name.startswith("mbrl_jax-")


def test_installs_and_imports_elsewhere(wheel, tmp_path):
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel)
    code = "import mbrl.types, world_models; print(mbrl.types.__file__); print(world_models.__file__)"
    out = run(
        sys.executable, "-c", code, cwd=elsewhere, env=os.environ | {"PYTHONPATH": str(target)}
    ).splitlines()
    assert [Path(line).is_relative_to(target) for line in out] == [True, True], out
