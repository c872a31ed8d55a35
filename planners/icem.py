"""iCEM: the cross-entropy method with coloured noise and elites that are kept (arXiv 2008.06389)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl.errors import check_at_least, check_between
from mbrl.planning import SearchRule, Stage
from mbrl.types import Array, ArraySpec
from planners.common import (
    CrossEntropyConfig,
    best,
    check_cross_entropy,
    elite_weights,
    moments,
    neutral,
    refuse_discrete,
    shifted,
)


@dataclass(frozen=True)
class ICEMConfig(CrossEntropyConfig):
    """iCEM's settings."""

    horizon: int = 30
    iterations: int = 3
    samples: int = 128
    """Candidates of the first round (N); the paper studies budgets from 50 to 500 in all rounds."""
    elites: int = 10
    noise_beta: float = 2.0
    """Exponent of the noise's power spectrum 1 / f^beta over time; 0 is white noise (beta)."""
    decay: float = 1.25
    """Factor by which each round has fewer candidates than the one before, down to 2 K (gamma)."""
    keep: float = 0.3
    """Share of the elites that the next round, and the next search, get."""


class Warm(NamedTuple):
    """mean: [H, A]; kept: shifted elites [k, H, A]; known: whether there are any []."""

    mean: Array
    kept: Array
    known: Array


class Search(NamedTuple):
    """mean, std: [H, A]; kept: best elites so far [k, H, A] with their scores [k], -inf at first."""

    mean: Array
    std: Array
    kept: Array
    scores: Array
    warm: Warm
    proposals: Array


def colour(horizon: int, beta: float) -> np.ndarray:
    """Matrix [H, H] that turns white noise into noise of unit variance with power spectrum 1 / f^beta; the
    mean of a sequence has the power of the lowest frequency."""
    frequency = np.maximum(np.fft.rfftfreq(horizon), 1 / horizon)
    filtered = np.fft.irfft(np.fft.rfft(np.eye(horizon)) * frequency ** (-beta / 2), horizon)
    return (filtered / np.linalg.norm(filtered, axis=0)).astype(np.float32)


def rounds(config: ICEMConfig) -> tuple[Stage, ...]:
    """A stage for all rounds of one size."""
    least = min(config.elites + max(config.elites, config.policy_samples), config.samples)
    sizes = [max(least, int(config.samples / config.decay**i)) for i in range(config.iterations)]
    return tuple(Stage(len(list(equal)), size) for size, equal in groupby(sizes))


def make(config: ICEMConfig, action: ArraySpec) -> SearchRule:
    """Continuous actions; the best sequence of the last round is executed, not the mean."""
    refuse_discrete("icem", action)
    check_cross_entropy(config)
    check_between("search.keep", config.keep, 0, 1)
    check_at_least("search.samples", config.samples, config.elites + config.policy_samples)
    check_at_least("search.decay", config.decay, 1)
    check_at_least("search.noise_beta", config.noise_beta, 0)
    kept = max(1, round(config.keep * config.elites))  # the best is always kept, to be executed
    matrix = colour(config.horizon, config.noise_beta)

    def init_warm():
        return Warm(
            neutral(action, config.horizon),
            jnp.zeros((kept, config.horizon, action.size)),
            jnp.zeros((), bool),
        )

    def start(warm: Warm, proposals, key):
        std, scores = jnp.full_like(warm.mean, config.std), jnp.full(kept, -jnp.inf)
        sequences = jnp.broadcast_to(warm.mean, warm.kept.shape)
        return Search(warm.mean, std, sequences, scores, warm, proposals)

    def ask(search: Search, stage, i, key):
        count = stage.samples - config.policy_samples
        white = jax.random.normal(key, (count, action.size, config.horizon))
        noise = (white @ matrix).swapaxes(1, 2)
        fresh = jnp.clip(search.mean + search.std * noise, -1.0, 1.0)
        again = jnp.where(search.warm.known & (i == 0), search.warm.kept, fresh[:kept])
        fresh = jnp.concatenate([again, fresh[kept:]])[:count]
        fresh = fresh.at[-1].set(jnp.where(i == config.iterations - 1, search.mean, fresh[-1]))
        return jnp.concatenate([search.proposals, fresh])

    def tell(search: Search, stage, candidates, scores, gradients):
        pool, scores = jnp.concatenate([candidates, search.kept]), jnp.concatenate([scores, search.scores])
        elites, scores = best(pool, scores, config.elites)
        mean, std = moments(elites, elite_weights(scores))
        blend = lambda old, new: config.smoothing * old + (1 - config.smoothing) * new
        return search._replace(
            mean=blend(search.mean, mean),
            std=blend(search.std, std),
            kept=elites[:kept],
            scores=scores[:kept],
        )

    def select(search: Search, key, mode):
        return search.kept[0]

    def shift(search: Search, steps: int):
        repeat = lambda x: shifted(x, steps, jnp.repeat(x[-1:], steps, 0))
        return Warm(repeat(search.mean), jax.vmap(repeat)(search.kept), jnp.isfinite(search.scores).all())

    return SearchRule(
        init_warm,
        start,
        ask,
        tell,
        select,
        shift,
        action=action,
        horizon=config.horizon,
        stages=rounds(config),
        policy_samples=config.policy_samples,
    )
