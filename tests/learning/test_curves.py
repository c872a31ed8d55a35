"""Golden curves: what an agent has learned once it must learn again (`tests/data/curves.json`)."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from mbrl.statistics import bootstrap_interval, iqm

ROOT = Path(__file__).resolve().parents[2]
STORED = json.loads((ROOT / "tests" / "data" / "curves.json").read_text())

pytestmark = pytest.mark.learning


def load(script: str):
    """``main(argv)`` of a script, run in this process."""
    spec = importlib.util.spec_from_file_location(f"{script}_curves", ROOT / "experiments" / f"{script}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its annotations are looked up there
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.parametrize("name", STORED)
def test_an_agent_learns_as_it_did(name, tmp_path, capsys):
    """IQM over the same seeds above the lower end of the stored runs' 95 % bootstrap interval. Numbers differ
    from the stored ones where anything was changed that touches a training run, or on another processor."""
    stored = STORED[name]
    script, *flags = stored["command"].split()
    load(script)([*flags, "--run-dir", str(tmp_path / "run")])
    found = json.loads((tmp_path / "run" / "summary.json").read_text())["eval_return"]["per_seed"]
    lowest, _ = bootstrap_interval(stored["returns"])
    with capsys.disabled():
        print(f" IQM {iqm(found):.0f}, stored {iqm(stored['returns']):.0f}, at least {lowest:.0f}", end=" ")
    assert len(found) == len(stored["returns"])
    assert iqm(found) >= lowest, found
