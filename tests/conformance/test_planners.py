"""Every planner over every registered world model. A new rule is one row in TINY."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import planners
import world_models
from mbrl.config import config_type, load_factory, override
from mbrl.planning import make_objective, make_planner, simulator_of
from tests.conformance.test_world_models import ACTIONS, SAME, B, make_model, make_trajectory, randomise

SMALL: dict[str, Any] = dict(horizon=2, iterations=2, samples=5)
TINY: dict[str, dict[str, Any]] = {
    "mppi": SMALL | dict(elites=3, policy_samples=1),
    "mppi_classic": SMALL | dict(elites=5),
    "cem": SMALL | dict(elites=3),
    "icem": SMALL | dict(elites=2),
    "random": SMALL,
    "gradient": SMALL,
    "policy": dict(horizon=2),
    "guided": dict(horizon=2, policy_samples=3),
}
# A plan runs twice here and is compiled once for each pair: that should be fast.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
DISCRETE = ["mppi", "cem", "random", "policy", "guided"]
MODELS = [name for name in world_models.REGISTRY if name not in SAME]
PAIRS = [(rule, model, "continuous") for rule in TINY for model in MODELS]
PAIRS += [(rule, "rssm", "discrete") for rule in DISCRETE]


def test_every_rule_has_a_row():
    assert set(TINY) == set(planners.REGISTRY)


@pytest.fixture(scope="module")
def worlds():
    """(model, parameters, two acting states that differ in the last environment), by name."""
    made = {}

    def make(name: str, action: str):
        if (name, action) not in made:
            model = make_model(name, action)
            traj, params = make_trajectory(0, action), randomise(jax.jit(model.init)(jax.random.key(0)))
            state, step = model.init_state(params, B), jax.jit(model.observe_step)
            states = []
            for t in range(2):
                obs = {k: v[t] for k, v in traj.obs.items()}
                state = step(params, state, traj.action[t], obs, jnp.full(B, t == 0), jax.random.key(t))
                states.append(state)
            states[1] = jax.tree.map(lambda a, b: a.at[-1].set(b[-1]), *states)
            made[name, action] = model, params, states
        return made[name, action]

    return make


@pytest.mark.parametrize(("rule", "world", "action"), PAIRS, ids=map("-".join, PAIRS))
def test_planner_over_world_model(worlds, rule, world, action):
    """Plans twice in a row: valid actions, traces and warm start; deterministic; no environment sees another."""
    model, params, (state, other) = worlds(world, action)
    spec = ACTIONS[action]

    def policy(params, features, key):
        mean = features[..., : spec.size].astype(jnp.float32)
        if action == "discrete":
            index = mean.argmax(-1) if key is None else jax.random.categorical(key, mean)
            return jax.nn.one_hot(index, spec.size)
        return mean if key is None else mean + jax.random.normal(key, mean.shape)

    value = lambda params, features, key: features.astype(jnp.float32).mean(-1)
    factory = load_factory("--planner", rule, planners.REGISTRY)
    search = factory(override(config_type(factory)(), TINY[rule]), spec)
    planner = make_planner(simulator_of(model, policy, value), search)

    @partial(jax.jit, compiler_options=QUICK)
    def plan(warm, state, is_first, key):
        return planner.plan(params, make_objective(), warm, state, is_first, key, "train")

    def plan_twice(state):
        _, warm, _ = plan(planner.init(B), state, jnp.ones(B, bool), jax.random.key(2))
        return plan(warm, state, jnp.zeros(B, bool), jax.random.key(3))

    ours = plan_twice(state)
    chosen, warm, info = ours
    assert chosen.shape == (B, spec.size) and chosen.dtype == jnp.float32
    if action == "discrete":
        np.testing.assert_array_equal(
            np.sort(chosen, -1), np.broadcast_to(np.arange(spec.size) == 1, chosen.shape)
        )
    assert np.abs(chosen).max() <= 1
    rounds = sum(stage.iterations for stage in search.stages)
    assert all(x.shape == (rounds, B) and np.isfinite(x).all() for x in info.values())
    assert (info["best"] >= info["mean"] - 1e-5).all()
    assert jax.tree.map(jnp.shape, warm) == jax.tree.map(jnp.shape, planner.init(B))
    jax.tree.map(np.testing.assert_array_equal, ours, plan_twice(state))
    moved = plan_twice(other)
    close = lambda a, b: np.testing.assert_allclose(a[..., :-1], b[..., :-1], rtol=1e-4, atol=1e-5)
    close(moved[0].T, chosen.T)
    jax.tree.map(close, moved[2], info)
    assert plan._cache_size() == 1  # a carried warm start is like a fresh one
    if rounds:
        assert (np.asarray(moved[2]["best"][:, -1]) != np.asarray(info["best"][:, -1])).any()
