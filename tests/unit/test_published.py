"""The published curves that come with the package."""

import numpy as np
import pytest

from mbrl import published


@pytest.mark.parametrize("name", ["cup_catch", "ball_in_cup_catch", "dmc_cup_catch", "ball-in-cup-catch"])
def test_task_names_as_users_type_them(name):
    curve = published.curve(name)
    assert curve is not None and curve.task == "ball_in_cup_catch"


def test_every_curve_is_whole():
    assert len(published.tasks()) == 18
    assert len(published.tasks(suite="dmc_vision")) == 20
    for suite in ("dmc_proprio", "dmc_vision"):
        for task in published.tasks(suite=suite):
            curve = published.curve(task, suite=suite)
            assert curve.frames.shape == curve.mean.shape == curve.std.shape == (20,)
            assert (np.diff(curve.frames) > 0).all()
            assert (curve.mean >= 0).all() and (curve.mean <= 1000).all() and (curve.std >= 0).all()
            assert "danijar/dreamerv3@e3f0224" in curve.source and "size12m" in curve.source
            assert curve.num_seeds == 5 if suite == "dmc_proprio" else curve.num_seeds in (8, 9, 10)


def test_curves_of_tdmpc2():
    """Means alone, from 100,000 frames on, of dm_control's tasks."""
    assert len(published.tasks("tdmpc2")) == 28
    curve = published.curve("cup_catch", "tdmpc2")
    assert curve.frames[0] == 100_000 and (np.diff(curve.frames) > 0).all() and np.isnan(curve.std).all()
    assert curve.label == "tdmpc2, published, mean of 3 seeds" and "5M" in curve.source
    score = published.score_at("walker_walk", 100_000, "tdmpc2")
    assert score.text(1) == "961.9" and published.score_at("walker_walk", 99_999, "tdmpc2") is None
    assert published.score_at("walker_walk", 40_000).text() == "213 ± 60"
    assert published.curve("walker_walk", published.METHODS.get("pets", "")) is None


def test_values_of_one_curve():
    # Rows of the published curves (mbrl/data/README.md): bin ends 25,000, 50,000 and 500,000.
    curve = published.curve("walker_walk")
    np.testing.assert_allclose(curve.mean[[0, 1, -1]], [65.78, 213.44, 925.4])
    np.testing.assert_allclose(curve.std[[0, 1, -1]], [17.1, 59.52, 37.59])
    np.testing.assert_array_equal(curve.frames[[0, 1, -1]], [15_000, 40_000, 485_000])
    assert curve.num_seeds == 5


def test_score_at_interpolates_and_never_extrapolates():
    assert published.score_at("walker_walk", 40_000).mean == pytest.approx(213.44)
    assert published.score_at("walker_walk", 27_500).mean == pytest.approx((65.78 + 213.44) / 2)
    assert published.score_at("walker_walk", 100_000).mean == pytest.approx(461.05 + 0.4 * (602.97 - 461.05))
    assert published.score_at("walker_walk", 500_000).mean == pytest.approx(925.4)
    assert published.score_at("walker_walk", 10_000) is None
    assert published.score_at("walker_walk", 1_000_000) is None


def test_unknown_is_none():
    assert published.curve("walker_fly") is None
    assert published.curve("quadruped_walk") is None  # vision only
    assert published.curve("quadruped_walk", suite="dmc_vision") is not None
    assert published.score_at("walker_fly", 100_000) is None
    assert published.curve("walker_walk", method="nobody") is None
