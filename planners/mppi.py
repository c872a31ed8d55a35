"""Model predictive path integral control: as TD-MPC2 has it (arXiv 2310.16828), and the classic rule.

TD-MPC2's differs from the classic one (arXiv 1509.01149): only the best candidates count, the spread is
learned over iterations, sequences of the policy take part, and an elite drawn by weight is executed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from mbrl.errors import UserError, check_at_least
from mbrl.planning import SearchRule, Stage
from mbrl.types import Array, ArraySpec
from planners.common import (
    EliteConfig,
    best,
    check,
    draw,
    moments,
    neutral,
    shifted,
)


@dataclass(frozen=True)
class MPPIConfig(EliteConfig):
    """TD-MPC2's settings."""

    horizon: int = 3
    iterations: int = 6
    extra_iterations: int = 2
    """Further rounds from 20 action dimensions on."""
    samples: int = 512
    policy_samples: int = 24
    temperature: float = 0.5
    """Factor of the score in an elite's weight exp(temperature * score) (tau; the classic 1 / lambda)."""
    min_std: float = 0.05
    """Smallest standard deviation, of actions in [-1, 1]."""
    max_std: float = 2.0
    """Largest standard deviation, which every search begins with."""
    execute: Literal["sample", "mean"] = "sample"
    """What is executed: an elite drawn by its weight, or the mean."""

    VARIES: ClassVar[tuple[str, ...]] = ("temperature",)


@dataclass(frozen=True)
class ClassicMPPIConfig(MPPIConfig):
    """Classic MPPI: all candidates count, the spread is fixed, the weighted mean is executed."""

    horizon: int = 12
    iterations: int = 1
    extra_iterations: int = 0
    elites: int = 512
    policy_samples: int = 0
    temperature: float = 1.0
    min_std: float = 0.5
    max_std: float = 0.5
    execute: Literal["sample", "mean"] = "mean"


class Search(NamedTuple):
    """mean, std: [H, A]; of discrete actions the mean is their chances. elites: [K, H, A], weights: [K]."""

    mean: Array
    std: Array
    elites: Array
    weights: Array
    proposals: Array


def make(config: MPPIConfig, action: ArraySpec) -> SearchRule:
    """The rule for continuous or one-hot actions. With one iteration, discrete actions are searched as in
    TD-MPC2's branch for them: uniform sequences beside the policy's, without a warm start."""
    check(config, "elites")
    if not 0 < config.min_std <= config.max_std:
        raise UserError(
            f"search.min_std is {config.min_std}, it must be positive and at most search.max_std, "
            f"which is {config.max_std}"
        )
    check_at_least("search.extra_iterations", config.extra_iterations, 0)
    discrete = action.classes is not None
    iterations = config.iterations + (config.extra_iterations if action.size >= 20 else 0)

    def init_warm():
        return neutral(action, config.horizon)

    def start(warm, proposals, key):
        mean = init_warm() if discrete else warm
        std = jnp.full_like(mean, config.max_std)
        elites = jnp.broadcast_to(mean, (config.elites, *mean.shape))
        return Search(mean, std, elites, jnp.full(config.elites, 1 / config.elites), proposals)

    def ask(search: Search, stage, i, key):
        count = stage.samples - config.policy_samples
        return jnp.concatenate([search.proposals, draw(key, count, search.mean, search.std, action)])

    def tell(search: Search, stage, candidates, scores, gradients):
        elites, scores = best(candidates, scores, config.elites)
        weights = jax.nn.softmax(config.temperature * scores)
        mean, std = moments(elites, weights)
        std = jnp.clip(std, config.min_std, config.max_std)
        return search._replace(mean=mean, std=std, elites=elites, weights=weights)

    def select(search: Search, key, mode):
        draw_key, noise_key = jax.random.split(key)
        if config.execute == "mean" and not discrete:
            sequence = search.mean
        else:
            sequence = search.elites[jax.random.categorical(draw_key, jnp.log(search.weights))]
        if mode == "eval" or discrete:
            return sequence
        noise = search.std[0] * jax.random.normal(noise_key, search.std[0].shape)
        return sequence.at[0].set(jnp.clip(sequence[0] + noise, -1.0, 1.0))

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
        stages=(Stage(iterations, config.samples),),
        policy_samples=config.policy_samples,
    )


def make_classic(config: ClassicMPPIConfig, action: ArraySpec) -> SearchRule:
    """The same with the classic settings as defaults."""
    return make(config, action)
