"""Gradient ascent on the actions by Adam through a differentiable simulator, from several starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mbrl.errors import check_at_least, check_between
from mbrl.planning import SearchRule, Stage
from mbrl.types import Array, ArraySpec
from planners import cem
from planners.cem import CEMConfig
from planners.common import SearchConfig, check, check_positive, neutral, refuse_discrete, shifted
from planners.random import keep_best


@dataclass(frozen=True)
class GradientConfig(SearchConfig):
    """Steps of Adam; with cem_iterations the cross-entropy method finds the start ("Grad-CEM")."""

    iterations: int = 20
    """Steps of Adam per plan (I)."""
    samples: int = 8
    """Sequences that are improved at once: the last plan's, the policy's, and random ones (N)."""
    learning_rate: float = 0.1
    """Of Adam, of actions in [-1, 1]."""
    std: float = 0.5
    """Standard deviation of the random starts around the last plan."""
    cem_iterations: int = 0
    """Rounds of the cross-entropy method before; 0 is off."""
    cem_samples: int = 64
    """Its candidates per round."""
    cem_elites: int = 8
    """Its elites."""


class Search(NamedTuple):
    """population: [N, H, A] and its optimiser state; sequence: the best so far [H, A], with its score []."""

    population: Array
    optimiser: Any
    sequence: Array
    score: Array
    cem: Any


def make(config: GradientConfig, action: ArraySpec) -> SearchRule:
    """Continuous actions. Steps are clipped to [-1, 1]; a gradient that is not finite moves nothing, and a
    sequence whose score is not goes back to the best so far."""
    refuse_discrete("gradient", action)
    check(config)
    check_at_least("search.cem_iterations", config.cem_iterations, 0)
    check_between("search.cem_elites", config.cem_elites, 1, config.cem_samples)
    check_positive(config, "learning_rate")
    check_positive(config, "std")
    adam = optax.adam(config.learning_rate)
    first = cem.make(
        CEMConfig(
            horizon=config.horizon,
            samples=config.cem_samples,
            elites=config.cem_elites,
            policy_samples=config.policy_samples if config.cem_iterations else 0,
            std=config.std,
        ),
        action,
    )

    def init_warm():
        return neutral(action, config.horizon)

    def start(warm, proposals, key):
        count = config.samples - 1 - config.policy_samples
        noise = config.std * jax.random.normal(key, (max(count, 0), *warm.shape))
        population = jnp.concatenate([warm[None], proposals, jnp.clip(warm + noise, -1.0, 1.0)])
        population = population[: config.samples]
        search = first.start(warm, proposals, key)
        return Search(population, adam.init(population), warm, -jnp.inf * jnp.ones(()), search)

    def ask(search: Search, stage: Stage, i, key):
        return search.population if stage.gradient else first.ask(search.cem, stage, i, key)

    def tell(search: Search, stage: Stage, candidates, scores, gradients):
        search = keep_best(search, candidates, scores)
        if not stage.gradient:
            found = first.tell(search.cem, stage, candidates, scores, None)
            return search._replace(cem=found, population=search.population.at[0].set(found.mean))
        gradients = jnp.where(jnp.isfinite(gradients), gradients, 0.0)
        updates, optimiser = adam.update(-gradients, search.optimiser)
        moved: Any = optax.apply_updates(search.population, updates)
        finite = jnp.isfinite(scores)[:, None, None]
        population = jnp.where(finite, jnp.clip(moved, -1.0, 1.0), search.sequence)
        return search._replace(population=population, optimiser=optimiser)

    def shift(search: Search, steps: int):
        return shifted(search.sequence, steps, init_warm()[:steps])

    stages = (Stage(config.cem_iterations, config.cem_samples),) if config.cem_iterations else ()
    return SearchRule(
        init_warm,
        start,
        ask,
        tell,
        select=lambda search, key, mode: search.sequence,
        shift=shift,
        action=action,
        horizon=config.horizon,
        stages=(*stages, Stage(config.iterations, config.samples, gradient=True)),
        policy_samples=config.policy_samples,
    )
