"""Dreamer learns from pictures alone, with the preset that a CPU gets without flags (docs/pixels.md)."""

from __future__ import annotations

import pytest

from mbrl import results
from tests.helpers import script

pytestmark = pytest.mark.learning


def test_pendulum_from_pixels(tmp_path):
    """Two seeds of the pendulum with a smooth reward, after two thousand updates. Random actions have about 50,
    at best 170."""
    run_dir = tmp_path / "run"
    flags = "--task pendulum_dense --obs pixels --preset s_pixels --num-seeds 2 --steps 8000"
    script("dreamer_dmc")([*flags.split(), "--run-dir", str(run_dir)])
    returns = results.read(run_dir).summary["eval_return"]["per_seed"]
    assert min(returns) > 250, returns
