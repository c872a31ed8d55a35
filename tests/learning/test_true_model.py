"""Planners with the true model of the cartpole swing-up: more search is better search."""

from __future__ import annotations

from functools import cache

import jax
import numpy as np
import pytest

import planners
from mbrl import envs
from mbrl.config import config_type, load_factory, override
from mbrl.planning import make_objective, make_planner
from mbrl.true_model import control, simulator_of_env

pytestmark = pytest.mark.learning


@cache
def score(name: str, warm: bool = True, **fields: int) -> float:
    """Mean return of an episode: 3 seeds of 2 environments, plans of a second."""
    env = envs.make_jax("cartpole", action_repeat=4)
    factory = load_factory("planner", name, planners.REGISTRY)
    rule = factory(override(config_type(factory)(), fields | {"horizon": 25}), env.spec.action)
    planner = make_planner(simulator_of_env(env), rule)
    episodes = lambda key: control(env, planner, make_objective(), key, 2, env.spec.max_steps or 0, warm)[
        0
    ].sum(0)
    program = jax.jit(lambda keys: jax.lax.map(episodes, keys))
    return float(np.asarray(program(jax.random.split(jax.random.key(0), 3))).mean())


def mppi(iterations: int, samples: int, warm: bool = True) -> float:
    return score("mppi", warm, iterations=iterations, samples=samples, elites=samples // 8, policy_samples=0)


def test_return_rises_with_iterations():
    assert mppi(1, 64) < mppi(3, 64) < mppi(6, 64)


def test_return_rises_with_samples():
    assert mppi(3, 16) < mppi(3, 64) < mppi(3, 256)


def test_mppi_beats_random_shooting_with_as_many_candidates():
    assert mppi(3, 64) > score("random", samples=192)


def test_a_warm_start_helps():
    assert mppi(3, 64) > mppi(3, 64, warm=False)
