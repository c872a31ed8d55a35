"""Aggregates over runs: the interquartile mean and its stratified bootstrap interval.

Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice". NumPy only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Statistic = Callable[[np.ndarray], float]


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
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie in (0, 1), found {confidence}")
    runs = scores.shape[0]
    if runs < 2:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, runs, size=(samples, *scores.shape))
    resampled = np.take_along_axis(scores[None], drawn, axis=1)
    values = np.array([statistic(one) for one in resampled])
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(values, [tail, 100.0 - tail])
    return float(low), float(high)
