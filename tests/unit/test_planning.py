"""Planners on a linear-quadratic problem, whose optimum is known, and the rules of the driver."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import planners
from mbrl.config import config_type, load_factory, override
from mbrl.planning import make_objective, make_planner
from mbrl.types import ArraySpec, Prediction, Simulator, Starts

E, STEPS = 3, 30
DYNAMICS = np.array([[1.0, 0.1], [0.0, 1.0]])
INPUT = np.array([[0.005], [0.1]])
COST, EFFORT = np.diag([1.0, 0.1]), np.array([[0.1]])
ACTION = ArraySpec((1,))
ZERO = jax.random.key(0)


def riccati():
    """Cost-to-go matrix P and gain K of u = -K x, where the cost of a step is x'Qx of the next x and u'Ru."""
    p = np.zeros((2, 2))
    for _ in range(2000):
        s = COST + p
        k = np.linalg.solve(EFFORT + INPUT.T @ s @ INPUT, INPUT.T @ s @ DYNAMICS)
        p = k.T @ EFFORT @ k + (DYNAMICS - INPUT @ k).T @ s @ (DYNAMICS - INPUT @ k)
    return p, k


P, K = riccati()


class Point(NamedTuple):
    """x: position and velocity [..., 2]. action: the last one, which the reward on arrival charges."""

    x: jax.Array
    action: jax.Array


def step(params, ctx, state: Point, action, key) -> Point:
    return Point(state.x @ jnp.float32(DYNAMICS.T) + action @ jnp.float32(INPUT.T), action)


def cost(state: Point):
    return (
        jnp.einsum("...i,ij,...j->...", state.x, jnp.float32(COST), state.x) + 0.1 * state.action[..., 0] ** 2
    )


def predict(params, state: Point) -> Prediction:
    reward = -cost(state)
    return Prediction(reward, jnp.ones_like(reward), {})


LQR = Simulator(
    starts=lambda params, state: Starts((), state),
    imagine_init=lambda params, starts, horizon: starts.states,
    imagine_step=step,
    predict=predict,
    features=lambda params, state: state.x,
    value=lambda params, x, key: -jnp.einsum("...i,ij,...j->...", x, jnp.float32(P), x),
)


def points() -> Point:
    """Starts from where no optimal action leaves [-1, 1]."""
    return Point(jnp.array([[0.15, 0.12], [0.22, -0.1], [-0.1, -0.2]]), jnp.zeros((E, 1)))


def make_rule(name: str, action: ArraySpec = ACTION, **fields):
    factory = load_factory("--planner", name, planners.REGISTRY)
    return factory(override(config_type(factory)(), fields), action)


def closed_loop(planner, state: Point):
    """Costs [STEPS, E] of acting by ``planner``."""
    objective = make_objective()

    def body(carry, inputs):
        state, warm = carry
        first, key = inputs
        action, warm, _ = planner.plan((), objective, warm, state, jnp.full(E, first), key, "eval")
        state = step((), (), state, action, key)
        return (state, warm), cost(state)

    inputs = jnp.arange(STEPS) == 0, jax.random.split(ZERO, STEPS)
    return jax.lax.scan(body, (state, planner.init(E)), inputs)[1]


# Small budgets that suffice for two dimensions. The cost is of order 0.1, which wants a high temperature.
SHORT = dict(horizon=4, samples=64)
RULES = {
    "mppi": SHORT | dict(policy_samples=0, elites=8, temperature=300.0, min_std=0.02),
    "mppi_classic": SHORT
    | dict(iterations=4, samples=128, elites=128, temperature=1000.0, min_std=0.2, max_std=0.2),
    "cem": SHORT | dict(elites=8),
    "icem": SHORT | dict(elites=8, iterations=5),
    "random": dict(horizon=2, samples=1000),
    "gradient": dict(horizon=4, samples=2),
    "grad_cem": dict(horizon=4, samples=2, iterations=10, cem_iterations=2),
    "policy": {},
    "guided": dict(horizon=2, policy_samples=16),
}


def test_every_rule_has_a_row():
    assert {rule_name(name) for name in RULES} == set(planners.REGISTRY)


def rule_name(row: str) -> str:
    return {"grad_cem": "gradient"}.get(row, row)


def policy(params, x, key):
    """The optimal gain, with noise unless asked for the mode."""
    action = -x @ jnp.float32(K.T)
    return action if key is None else action + 0.1 * jax.random.normal(key, action.shape)


@pytest.mark.parametrize("name", RULES)
def test_linear_quadratic_optimum(name):
    """The closed loop costs at most 5 % more than the optimum x'Px of the linear-quadratic regulator."""
    simulator = LQR._replace(policy=policy) if name in ("policy", "guided") else LQR
    planner, start = make_planner(simulator, make_rule(rule_name(name), **RULES[name])), points()
    costs = np.asarray(jax.jit(lambda s: closed_loop(planner, s))(start), np.float64)
    optimum = np.einsum("ei,ij,ej->e", start.x, P, start.x)
    print(name, costs.sum(0) / optimum)
    assert 0.9 * optimum.sum() < costs.sum() < 1.05 * optimum.sum()  # not counted is what STEPS leave over


def test_mppi_step_as_in_tdmpc2():
    """Elites, weights, mean and spread of one iteration, computed apart; a score of -inf weighs nothing."""
    rule = make_rule("mppi", samples=12, elites=4, policy_samples=2, horizon=3)
    rng = np.random.default_rng(0)
    candidates, scores = rng.uniform(-1, 1, (12, 3, 1)), rng.normal(size=12) * 3
    scores[[2, 3, 4, 5, 6, 7, 8, 9, 10]] = -np.inf
    for kept in (12, 3):  # with 3, an elite has no finite score
        values = scores if kept == 3 else rng.normal(size=12) * 3
        search = rule.start(rule.init_warm(), jnp.zeros((2, 3, 1)), ZERO)
        search = rule.tell(search, rule.stages[0], jnp.float32(candidates), jnp.float32(values), None)
        order = np.argsort(-values)[:4]
        weight = np.exp(0.5 * (values[order] - values.max()))
        weight /= weight.sum()
        mean = sum(w * candidates[i] for w, i in zip(weight, order))
        variance = sum(w * (candidates[i] - mean) ** 2 for w, i in zip(weight, order))
        np.testing.assert_allclose(search.mean, mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(search.std, np.clip(np.sqrt(variance), 0.05, 2.0), rtol=1e-4)
        np.testing.assert_allclose(search.weights, weight, rtol=1e-4)
    chosen = {float(rule.select(search, key, "eval")[0, 0]) for key in jax.random.split(ZERO, 30)}
    assert chosen <= {float(np.float32(candidates[i, 0, 0])) for i in (0, 1, 11)} and len(chosen) > 1
    assert (
        float(rule.shift(search, 1)[0, 0]) == float(search.mean[1, 0]) and rule.shift(search, 1)[-1, 0] == 0
    )
