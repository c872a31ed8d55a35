"""What search rules share: distributions over action sequences, their elites, and the warm start."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mbrl.errors import UserError, check_at_least
from mbrl.types import Array, ArraySpec


@dataclass(frozen=True)
class SearchConfig:
    """Fields that every search rule has."""

    horizon: int = 12
    """Actions in a plan (H)."""
    iterations: int = 6
    """Rounds of candidates per plan (I)."""
    samples: int = 256
    """Candidates per round (N), those of the policy included."""


def check(config: SearchConfig, *at_least_one: str) -> None:
    """UserError unless the common counts, and those named, are 1 or more."""
    for name in ("horizon", "iterations", "samples", *at_least_one):
        check_at_least(f"planner.{name}", getattr(config, name), 1)


def check_at_most_samples(config: SearchConfig, name: str) -> None:
    """UserError if a part of the candidates is more than all of them."""
    if (value := getattr(config, name)) > config.samples:
        raise UserError(f"planner.{name} is {value}, it must be at most planner.samples, {config.samples}")


def refuse_discrete(rule: str, action: ArraySpec) -> None:
    if action.classes is not None:
        raise UserError(
            f"planner {rule} searches continuous actions, and these are discrete: use mppi, cem or random"
        )


def neutral(action: ArraySpec, horizon: int) -> Array:
    """The mean [H, A] to begin with: the middle of continuous actions, equal chances of discrete ones."""
    return jnp.full((horizon, action.size), 0.0 if action.classes is None else 1 / action.size)


def draw(key: Array, count: int, mean: Array, std: Array, action: ArraySpec) -> Array:
    """Candidates [count, H, A]: normal around ``mean`` and clipped, or one-hot with the chances ``mean``, to
    which a little of the uniform is mixed, because an action that no elite took could not come back."""
    if action.classes is None:
        return jnp.clip(mean + std * jax.random.normal(key, (count, *mean.shape)), -1.0, 1.0)
    index = jax.random.categorical(
        key, jnp.log(0.95 * mean + 0.05 / action.size), shape=(count, mean.shape[0])
    )
    return jax.nn.one_hot(index, action.size)


def best(candidates: Array, scores: Array, count: int) -> tuple[Array, Array]:
    """The ``count`` candidates of the highest scores, and these, best first."""
    scores, index = jax.lax.top_k(scores, count)
    return candidates[index], scores


def moments(elites: Array, weights: Array) -> tuple[Array, Array]:
    """Mean and standard deviation [H, A] of elites [K, H, A] with weights [K] that sum to 1."""
    mean = jnp.tensordot(weights, elites, 1)
    return mean, jnp.sqrt(jnp.tensordot(weights, jnp.square(elites - mean), 1))


def shifted(sequence: Array, steps: int, tail: Array) -> Array:
    """The sequence [H, ...] from ``steps`` on, ``tail`` [steps, ...] behind it."""
    return jnp.concatenate([sequence[steps:], tail])
