"""Planners with the true model of the cartpole swing-up: more search is better search."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from benchmarks.planning import CEM, mppi
from benchmarks.planning import measure as run

pytestmark = pytest.mark.learning


@cache
def measured(name: str, fields: tuple[tuple[str, Any], ...], warm: bool) -> float:
    return float(run(name, dict(fields), warm, seeds=4, num_envs=4).returns.mean())


def score(name: str, fields: dict[str, Any], warm: bool = True) -> float:
    """Mean return of 16 episodes, with plans of a second; the standard error is 6 to 16."""
    return measured(name, tuple(fields.items()), warm)


def test_return_rises_with_iterations():
    assert score("mppi", mppi(1, 64)) < score("mppi", mppi(3, 64)) < score("mppi", mppi(6, 64))


def test_return_rises_with_samples():
    assert score("mppi", mppi(3, 16)) < score("mppi", mppi(3, 64)) < score("mppi", mppi(3, 256))


def test_mppi_beats_random_shooting_with_as_many_candidates():
    assert score("mppi", mppi(3, 64)) > score("random", dict(samples=192))


@pytest.mark.parametrize(("name", "fields"), [("mppi", mppi(3, 64, max_std=0.5)), ("cem", CEM)])
def test_a_warm_start_helps(name, fields):
    """Where searches begin with a spread that leaves something of their mean."""
    assert score(name, fields) > score(name, fields, warm=False) + 20
