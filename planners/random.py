"""Random shooting: uniform sequences, the best is executed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mbrl.planning import SearchRule, Stage
from mbrl.types import Array, ArraySpec
from planners.common import SearchConfig, check, neutral


@dataclass(frozen=True)
class RandomConfig(SearchConfig):
    """Uniform candidates; rounds add up, so that memory holds one round only."""

    iterations: int = 1
    samples: int = 1000


class Search(NamedTuple):
    """sequence: the best so far [H, A], with its score []."""

    sequence: Array
    score: Array
    proposals: Array


def keep_best(search, candidates: Array, scores: Array):
    """The search with its best sequence so far; for searches with the fields ``sequence`` and ``score``."""
    index = scores.argmax()
    better = scores[index] > search.score
    return search._replace(
        sequence=jnp.where(better, candidates[index], search.sequence),
        score=jnp.maximum(scores[index], search.score),
    )


def make(config: RandomConfig, action: ArraySpec) -> SearchRule:
    """Continuous or one-hot actions, without a warm start."""
    check(config)

    def start(warm, proposals, key):
        return Search(neutral(action, config.horizon), -jnp.inf * jnp.ones(()), proposals)

    def ask(search: Search, stage, i, key):
        shape = stage.samples - config.policy_samples, config.horizon
        if action.classes is None:
            fresh = jax.random.uniform(key, (*shape, action.size), minval=-1.0, maxval=1.0)
        else:
            fresh = jax.nn.one_hot(jax.random.randint(key, shape, 0, action.size), action.size)
        return jnp.concatenate([search.proposals, fresh])

    def tell(search: Search, stage, candidates, scores, gradients):
        return keep_best(search, candidates, scores)

    return SearchRule(
        init_warm=tuple,
        start=start,
        ask=ask,
        tell=tell,
        select=lambda search, key, mode: search.sequence,
        shift=lambda search, steps: (),
        action=action,
        horizon=config.horizon,
        stages=(Stage(config.iterations, config.samples),),
        policy_samples=config.policy_samples,
    )
