"""What search rules share: distributions over action sequences, their elites, and the warm start."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mbrl.errors import UserError, check_at_least, check_between
from mbrl.planning import RuleConfig
from mbrl.types import Array, ArraySpec


@dataclass(frozen=True)
class SearchConfig(RuleConfig):
    """Fields that every search rule has."""

    horizon: int = 12
    """Actions in a plan (H)."""
    iterations: int = 6
    """Rounds of candidates per plan (I)."""
    samples: int = 256
    """Candidates per round (N), those of the policy included."""
    policy_samples: int = 0
    """Sequences of the policy among the candidates of every round."""


@dataclass(frozen=True)
class EliteConfig(SearchConfig):
    """Fields of rules that move to where their best candidates are."""

    elites: int = 64
    """Best candidates that form the next mean and spread (K)."""


@dataclass(frozen=True)
class CrossEntropyConfig(EliteConfig):
    """Fields of the cross-entropy methods."""

    smoothing: float = 0.1
    """Weight of the old mean and spread in the new ones (alpha); spread is the variance in cem, the standard
    deviation in icem."""
    std: float = 0.5
    """Standard deviation that every search begins with, of actions in [-1, 1]."""


def check(config: SearchConfig, *parts: str) -> None:
    """UserError for impossible counts; ``parts`` names fields that count some of the candidates."""
    for name in ("horizon", "iterations", "samples", *parts):
        check_at_least(f"search.{name}", getattr(config, name), 1)
    check_at_least("search.policy_samples", config.policy_samples, 0)
    for name in ("policy_samples", *parts):
        if (value := getattr(config, name)) > config.samples:
            raise UserError(
                f"search.{name} is {value}, it must be at most search.samples, which is {config.samples}"
            )


def check_positive(config: SearchConfig, name: str) -> None:
    """UserError unless the field is above 0."""
    if not (value := getattr(config, name)) > 0:
        raise UserError(f"search.{name} is {value}, it must be positive")


def check_cross_entropy(config: CrossEntropyConfig) -> None:
    """UserError for impossible values."""
    check(config, "elites")
    check_between("search.smoothing", config.smoothing, 0, 1)
    check_positive(config, "std")


def refuse_discrete(rule: str, action: ArraySpec) -> None:
    """UserError for a rule that cannot search one-hot actions."""
    if action.classes is not None:
        raise UserError(
            f"planner {rule} searches continuous actions, and these are discrete: use mppi, cem or random"
        )


def neutral(action: ArraySpec, horizon: int) -> Array:
    """The mean [H, A] to begin with: the middle of continuous actions, equal chances of discrete ones."""
    middle = 0.0 if action.classes is None else 1 / action.size
    return jnp.full((horizon, action.size), middle, jnp.float32)


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


def elite_weights(scores: Array) -> Array:
    """Equal weights [K] of the elites, none for those whose score is not finite; at least one must be."""
    finite = jnp.isfinite(scores)
    return finite / finite.sum()
