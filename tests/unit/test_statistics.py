"""mbrl.statistics against SciPy, a hand-worked example, and an independent bootstrap."""

import numpy as np
import pytest
import scipy.stats

from mbrl.statistics import bootstrap_interval, iqm


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 10, 33])
def test_iqm_is_scipys_trim_mean_as_in_rliable(n):
    x = np.random.default_rng(n).normal(size=n)
    assert iqm(x) == pytest.approx(scipy.stats.trim_mean(x, 0.25, axis=None), rel=1e-12)


def test_iqm_by_hand_and_over_tasks():
    assert iqm([1000, 1, 2, 3, -1000, 4, 5, 6]) == pytest.approx((2 + 3 + 4 + 5) / 4)
    scores = np.arange(12.0).reshape(4, 3)
    assert iqm(scores) == iqm(scores.ravel())


def test_iqm_of_a_failed_run_is_nan_and_of_nothing_an_error():
    assert np.isnan(iqm([1.0, 2.0, 3.0, np.nan]))  # trimming must not hide it
    with pytest.raises(ValueError, match="at least one score"):
        iqm([])


def test_one_run_has_no_interval():
    assert np.isnan(bootstrap_interval([3.0])).all()
    assert np.isnan(bootstrap_interval([[3.0, 4.0]])).all()


def test_interval_agrees_with_scipys_bootstrap():
    x = np.random.default_rng(1).normal(size=12) * 100
    ours = bootstrap_interval(x, statistic=np.mean, samples=20_000)
    theirs = scipy.stats.bootstrap(
        (x,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    np.testing.assert_allclose(ours, theirs, atol=0.02 * x.std())


def test_interval_of_two_runs_enumerated():
    # Resamples of (0, 1): mean 0, 1/2, 1 with probability 1/4, 1/2, 1/4; 60 % leaves 20 % in each tail.
    assert bootstrap_interval([0.0, 1.0], np.mean, confidence=0.95) == (0.0, 1.0)
    assert bootstrap_interval([0.0, 1.0], np.mean, confidence=0.4) == (0.5, 0.5)


def test_runs_are_drawn_within_each_task():
    # Two tasks of very different scale without any spread: stratified resampling has nothing to vary.
    scores = np.stack([np.full(5, 1.0), np.full(5, 1000.0)], axis=1)
    assert bootstrap_interval(scores, np.mean) == (500.5, 500.5)


def test_each_task_is_drawn_independently():
    # If whole rows were drawn together, the two tasks would always cancel and the interval be a point.
    x = np.random.default_rng(0).normal(size=6)
    low, high = bootstrap_interval(np.stack([x, -x], axis=1), np.mean)
    assert high - low > 0.1


def test_interval_is_reproducible_and_ordered():
    x = np.random.default_rng(5).normal(size=30)
    low, high = bootstrap_interval(x, np.mean, seed=3)
    assert (low, high) == bootstrap_interval(x, np.mean, seed=3)
    assert (low, high) != bootstrap_interval(x, np.mean, seed=4)
    assert low <= np.mean(x) <= high


def test_interval_covers_the_mean_about_as_often_as_it_says():
    # A 90 % percentile interval of 30 normal runs covers in about 88 % of cases (measured over 4,000).
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(600):
        low, high = bootstrap_interval(rng.normal(size=30), np.mean, confidence=0.9, samples=300)
        hits += low <= 0.0 <= high
    assert 0.83 < hits / 600 < 0.93


@pytest.mark.parametrize("scores", [[], np.zeros((2, 2, 2)), 3.0])
def test_bad_shapes_are_named(scores):
    with pytest.raises(ValueError, match="scores must be"):
        bootstrap_interval(scores)
    with pytest.raises(ValueError, match="confidence must lie"):
        bootstrap_interval([1.0, 2.0], confidence=95.0)
