"""Statistics of scores over runs and tasks, with stratified bootstrap intervals.

Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice", in the
conventions of its library rliable, so that our numbers compare with published ones. NumPy only.

Scores of several tasks are ``Scores``: one array per task, with as many entries as the task has runs. Where
all have equally many, statistics of Scores are those of rliable's matrix [runs, tasks]. A score that is not a
number makes the statistic NaN: failed runs are not dropped in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Statistic = Callable[[np.ndarray], float]
Scores = Sequence[Any]


def iqm(x) -> float:
    """Interquartile mean of all entries of ``x`` (any shape, at least one entry).

    Convention of ``scipy.stats.trim_mean(x, 0.25, axis=None)``, which rliable uses, so that our numbers
    compare with published ones: ``int(0.25 * n)`` WHOLE scores are dropped at each end and the rest is
    averaged (no fractional weights). Hence with fewer than four scores nothing is dropped and the IQM is
    the mean. A NaN among the scores gives NaN: failed runs are not dropped in silence.

    Raises ValueError when ``x`` is empty.
    """
    x = np.sort(np.asarray(x, dtype=np.float64), axis=None)
    if x.size == 0:
        raise ValueError("iqm needs at least one score, found none")
    if np.isnan(x[-1]):  # sort puts NaN last, where trimming would hide it
        return float("nan")
    cut = int(0.25 * x.size)
    return float(x[cut : x.size - cut].mean())


def bootstrap_interval(
    scores,
    statistic: Statistic = iqm,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of ``statistic`` over runs.

    scores: [runs] or [runs, tasks]. With tasks, runs are drawn with replacement within each task
    (stratified), so every resample has the same number of runs of every task. statistic: maps an array of
    the shape of ``scores`` to a number. samples: number of resamples. seed: of the resampling; the same
    arguments give the same interval.

    With one run there is nothing to resample: the interval is (nan, nan). With two to five runs the
    percentile bootstrap is known to be too narrow; read it as a lower bound on the uncertainty.

    Raises ValueError for another rank, no runs, or a confidence outside (0, 1).
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim not in (1, 2) or scores.size == 0:
        raise ValueError(
            f"scores must be a non-empty [runs] or [runs, tasks] array, found shape {scores.shape}"
        )
    columns = [scores] if scores.ndim == 1 else list(scores.T)
    whole = lambda drawn: statistic(drawn[0] if scores.ndim == 1 else np.stack(drawn, axis=1))
    low, high = stratified_interval(whole, columns, confidence=confidence, samples=samples, seed=seed)
    return float(low), float(high)


def over_seeds(per_seed: np.ndarray, vary: Any = ()) -> dict[str, Any]:
    """{"mean", "iqm", "ci"} of scores [S], the last with NaN for one seed. vary: as in a run's record; where
    seeds differ in settings, nothing: numbers over different settings mean nothing."""
    if vary:
        return {}
    return {"mean": per_seed.mean(), "iqm": iqm(per_seed), "ci": list(bootstrap_interval(per_seed))}


def aggregate_iqm(scores: Scores) -> float:
    """`iqm` of the scores of all tasks together."""
    return iqm(np.concatenate(_checked(scores)))


def aggregate_mean(scores: Scores) -> float:
    """Mean over tasks of the mean over runs."""
    return float(np.mean([one.mean() for one in _checked(scores)]))


def aggregate_median(scores: Scores) -> float:
    """Median over tasks of the mean over runs. With one task that is its mean."""
    return float(np.median([one.mean() for one in _checked(scores)]))


def optimality_gap(scores: Scores, target: float = 1.0) -> float:
    """How far scores fall short: target minus the mean over tasks and runs of min(score, target)."""
    return float(target - np.mean([np.minimum(one, target).mean() for one in _checked(scores)]))


def performance_profile(scores: Scores, thresholds) -> np.ndarray:
    """[K] fraction of runs whose score is above each threshold [K], averaged over tasks."""
    thresholds = np.asarray(thresholds, np.float64)
    above = [(one[:, None] > thresholds).mean(0) for one in _checked(scores)]
    missing = np.isnan(np.concatenate(_checked(scores))).any()
    return np.full(thresholds.shape, np.nan) if missing else np.mean(above, 0)


def probability_of_improvement(x: Scores, y: Scores) -> float:
    """Probability that a run of X beats a run of Y on a task drawn at random, ties counting half.

    Mean over tasks of the Mann-Whitney U statistic over the number of pairs. Raises ValueError when the two
    have different numbers of tasks; they must be in the same order.
    """
    x, y = _checked(x), _checked(y)
    if len(x) != len(y):
        raise ValueError(f"both must have the same tasks, found {len(x)} and {len(y)}")
    if np.isnan(np.concatenate(x + y)).any():
        return float("nan")
    return float(np.mean([_wins(one, other) for one, other in zip(x, y)]))


def _wins(x: np.ndarray, y: np.ndarray) -> float:
    return float((x[:, None] > y).mean() + 0.5 * (x[:, None] == y).mean())


def first_reached(clock, values, threshold: float) -> float:
    """The ``clock`` (frames, seconds) of the first of ``values`` that is at least ``threshold``, else inf.

    clock, values: [K], in order. Evaluations are not interpolated: the threshold was passed before.
    """
    reached = np.flatnonzero(np.asarray(values, np.float64) >= threshold)
    return float(clock[reached[0]]) if reached.size else float("inf")


def stratified_interval(
    statistic: Callable[..., Any],
    *groups: Scores,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Percentile bootstrap interval (low, high) of ``statistic(*groups)``, a number or an array [K].

    Runs are drawn with replacement within each task of each group, independently. NaN where a task has a
    single run, as nothing is known of its spread. Raises ValueError for a confidence outside (0, 1).
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie in (0, 1), found {confidence}")
    checked = [_checked(group) for group in groups]
    if min(len(one) for group in checked for one in group) < 2:
        value = np.asarray(statistic(*checked), np.float64) * np.nan
        return (value[()], value[()])
    rng = np.random.default_rng(seed)
    drawn = lambda group: [one[rng.integers(0, len(one), len(one))] for one in group]
    values = np.array([statistic(*map(drawn, checked)) for _ in range(samples)])
    tail = 50.0 * (1.0 - confidence)
    # An infinite value (a threshold that was never reached) cannot be interpolated with a number.
    method = "inverted_cdf" if np.isinf(values).any() else "linear"
    low, high = np.percentile(values, [tail, 100.0 - tail], axis=0, method=method)
    return low, high


def _checked(scores: Scores) -> list[np.ndarray]:
    arrays = [np.asarray(one, np.float64) for one in scores]
    if not arrays or any(one.ndim != 1 or one.size == 0 for one in arrays):
        raise ValueError("scores must be one non-empty [runs] array per task, and at least one task")
    return arrays
