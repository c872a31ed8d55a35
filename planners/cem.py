"""The cross-entropy method with PETS' settings (arXiv 1805.12114)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mbrl.planning import SearchRule, Stage
from mbrl.types import Array, ArraySpec
from planners.common import (
    CrossEntropyConfig,
    best,
    check_cross_entropy,
    draw,
    elite_weights,
    moments,
    neutral,
    shifted,
)


@dataclass(frozen=True)
class CEMConfig(CrossEntropyConfig):
    """PETS' settings."""

    horizon: int = 25
    iterations: int = 5
    samples: int = 400
    elites: int = 40


class Search(NamedTuple):
    """mean, variance: [H, A]; of discrete actions the mean is their chances, the variance is not used."""

    mean: Array
    variance: Array
    proposals: Array


def make(config: CEMConfig, action: ArraySpec) -> SearchRule:
    """Normal distributions truncated to the bounds, or independent categoricals; executes the mean, or the
    likeliest of discrete actions. The number of iterations is fixed; PETS stops at a small variance."""
    check_cross_entropy(config)
    discrete = action.classes is not None

    def init_warm():
        return neutral(action, config.horizon)

    def start(warm, proposals, key):
        mean = (
            (warm + init_warm()) / 2 if discrete else warm
        )  # chances of 0 or 1 would leave nothing to search
        return Search(mean, jnp.full_like(mean, config.std**2), proposals)

    def ask(search: Search, stage, i, key):
        count = stage.samples - config.policy_samples
        if discrete:
            fresh = draw(key, count, search.mean, search.mean, action)
        else:
            # Two deviations stay within the bounds, so that the truncated samples do.
            std = jnp.minimum(jnp.sqrt(search.variance), (1 - jnp.abs(search.mean)) / 2)
            fresh = search.mean + std * jax.random.truncated_normal(key, -2, 2, (count, *std.shape))
        return jnp.concatenate([search.proposals, fresh])

    def tell(search: Search, stage, candidates, scores, gradients):
        elites, scores = best(candidates, scores, config.elites)
        mean, std = moments(elites, elite_weights(scores))
        blend = lambda old, new: config.smoothing * old + (1 - config.smoothing) * new
        return search._replace(
            mean=blend(search.mean, mean), variance=blend(search.variance, jnp.square(std))
        )

    def select(search: Search, key, mode):
        return jax.nn.one_hot(search.mean.argmax(-1), action.size) if discrete else search.mean

    def shift(search: Search, steps: int):
        return shifted(search.mean, steps, init_warm()[:steps])

    return SearchRule(
        init_warm,
        start,
        ask,
        tell,
        select,
        shift,
        action=action,
        horizon=config.horizon,
        stages=(Stage(config.iterations, config.samples),),
        policy_samples=config.policy_samples,
    )
