"""mbrl.statistics against SciPy, a hand-worked example, and an independent bootstrap."""

import numpy as np
import pytest
import scipy.stats

from mbrl.statistics import (
    aggregate_iqm,
    aggregate_mean,
    aggregate_median,
    bootstrap_interval,
    first_reached,
    iqm,
    optimality_gap,
    over_seeds,
    performance_profile,
    probability_of_improvement,
    stratified_interval,
)


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


def test_seeds_of_several_settings_are_not_aggregated():
    scores = np.array([1.0, 3.0])
    assert over_seeds(scores) == {"mean": 2.0, "iqm": 2.0, "ci": list(bootstrap_interval(scores))}
    assert over_seeds(scores, {"agent.lam": [0.9, 0.95]}) == {}


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


# Several tasks. By hand: two tasks, runs (0, 1, 2, 3) and (4, 0, 2, 2).
HAND = [np.array([0.0, 1.0, 2.0, 3.0]), np.array([4.0, 0.0, 2.0, 2.0])]


def test_aggregates_by_hand():
    assert aggregate_mean(HAND) == pytest.approx((1.5 + 2.0) / 2)
    assert aggregate_median(HAND) == pytest.approx((1.5 + 2.0) / 2)  # of two means
    assert aggregate_median([*HAND, np.array([9.0])]) == 2.0
    assert aggregate_iqm(HAND) == pytest.approx((1 + 2 + 2 + 2) / 4)  # 0 0 | 1 2 2 2 | 3 4
    # Short of 2 by 2 1 0 0 and 0 2 0 0.
    assert optimality_gap(HAND, 2.0) == pytest.approx((3 / 4 + 2 / 4) / 2)
    np.testing.assert_allclose(performance_profile(HAND, [-1, 0, 1.5, 4]), [1, 0.75, 0.625, 0])


def test_probability_of_improvement_by_hand():
    # Pairs (x, y): 2>1, 2=2, 0<1, 0<2: one win and one tie of four.
    assert probability_of_improvement([[2.0, 0.0]], [[1.0, 2.0]]) == 1.5 / 4
    assert probability_of_improvement([[1.0], [0.0]], [[0.0], [1.0]]) == 0.5
    with pytest.raises(ValueError, match="same tasks"):
        probability_of_improvement(HAND, HAND[:1])


@pytest.mark.parametrize("shapes", [(5, 5, 5), (3, 8, 1, 12)])
def test_aggregates_equal_plain_python(shapes):
    """Written out with loops over numbers, and SciPy's U statistic; runs per task equal or not; with ties."""
    rng = np.random.default_rng(sum(shapes))
    x, y = ([np.round(rng.normal(0.5, 1, n), 1) for n in shapes] for _ in range(2))
    means = [sum(map(float, one)) / len(one) for one in x]
    ordered, half = sorted(means), len(means) // 2
    median = ordered[half] if len(means) % 2 else (ordered[half - 1] + ordered[half]) / 2
    gap = 1 - sum(sum(min(float(v), 1.0) for v in one) / len(one) for one in x) / len(x)
    pooled = sorted(float(v) for one in x for v in one)
    cut = len(pooled) // 4
    kept = pooled[cut : len(pooled) - cut]
    wins = [scipy.stats.mannwhitneyu(a, b).statistic / (len(a) * len(b)) for a, b in zip(x, y)]
    profile = [sum(sum(v > tau for v in one) / len(one) for one in x) / len(x) for tau in (-0.5, 0.3, 1.0)]
    close = lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    close(aggregate_mean(x), sum(means) / len(means))
    close(aggregate_median(x), median)
    close(aggregate_iqm(x), sum(kept) / len(kept))
    close(optimality_gap(x), gap)
    close(probability_of_improvement(x, y), np.mean(wins))
    close(performance_profile(x, [-0.5, 0.3, 1.0]), profile)


@pytest.mark.parametrize("bad", [[], [np.zeros(0)], [np.zeros((2, 2))]])
def test_scores_of_a_wrong_shape_are_named(bad):
    with pytest.raises(ValueError, match="one non-empty"):
        aggregate_mean(bad)


def test_a_failed_run_is_not_hidden():
    failed = [np.array([1.0, np.nan, 2.0])]
    for statistic in (aggregate_iqm, aggregate_mean, aggregate_median, optimality_gap):
        assert np.isnan(statistic(failed))
    assert np.isnan(performance_profile(failed, [0.0])).all()
    assert np.isnan(probability_of_improvement(failed, [np.zeros(3)]))


def test_stratified_interval_agrees_with_scipys_bootstrap():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=9), rng.normal(1, 2, size=14)
    ours = stratified_interval(aggregate_mean, [x, y], samples=20_000)
    theirs = scipy.stats.bootstrap(
        (x, y), lambda a, b: (a.mean() + b.mean()) / 2, n_resamples=20_000, method="percentile",
        vectorized=False, rng=np.random.default_rng(2),
    ).confidence_interval  # fmt: skip
    np.testing.assert_allclose(ours, theirs, atol=0.03)


def test_stratified_interval_of_two_groups_enumerated():
    """X = (0, 2) and Y = (1, 1): P(X > Y) of a resample is 0, 1/2, 1 with probability 1/4, 1/2, 1/4."""
    x, y = [np.array([0.0, 2.0])], [np.array([1.0, 1.0])]
    assert stratified_interval(probability_of_improvement, x, y) == (0.0, 1.0)
    assert stratified_interval(probability_of_improvement, x, y, confidence=0.4) == (0.5, 0.5)


def test_interval_of_a_profile_contains_it_and_one_run_has_none():
    rng = np.random.default_rng(0)
    scores, taus = [rng.uniform(size=8), rng.uniform(size=8)], np.linspace(0, 1, 5)
    low, high = stratified_interval(lambda s: performance_profile(s, taus), scores, samples=300)
    profile = performance_profile(scores, taus)
    assert (low <= profile).all() and (profile <= high).all() and (high - low).max() > 0.1
    assert np.isnan(stratified_interval(aggregate_mean, [*scores, np.ones(1)])).all()
    with pytest.raises(ValueError, match="confidence"):
        stratified_interval(aggregate_mean, scores, confidence=95)


def test_first_reached():
    assert first_reached([10, 20, 30], [1.0, 5.0, 2.0], 2.0) == 20
    assert first_reached([10, 20], [1.0, np.nan], 2.0) == np.inf
