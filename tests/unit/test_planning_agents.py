"""Dreamer that acts by planning, and planning with the true dynamics."""

from __future__ import annotations

import dataclasses
import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import planners
from mbrl import envs
from mbrl.agents import dreamer
from mbrl.agents.dreamer import DreamerConfig
from mbrl.agents.planning import with_planner
from mbrl.config import config_type, load_factory, override
from mbrl.planning import evaluate, make_objective, make_planner, simulator_of
from mbrl.true_model import EnvState, simulator_of_env
from mbrl.types import ArraySpec, EnvSpec, Starts
from world_models import rssm, transformer
from world_models.rssm import RSSMConfig
from world_models.transformer import TransformerConfig

E = 3
LATENT: dict[str, Any] = dict(
    stoch=2, classes=3, units=8, hidden=8, prior_layers=1, encoder_layers=1, decoder_layers=1, bins=15
)
SPEC = EnvSpec("planning", {"state": ArraySpec((3,))}, ArraySpec((2,)))
CONFIG = DreamerConfig(
    units=8, actor_layers=1, critic_layers=1, horizon=3, bins=15, bin_limit=4.0, actor_average=0.9
)
MODEL = rssm.make(RSSMConfig(deter=8, blocks=1, bin_limit=4.0, **LATENT), SPEC)
AGENT = dreamer.make(CONFIG, SPEC, MODEL, 0.99, total_updates=100)
LASTING = dreamer.make(dataclasses.replace(CONFIG, noise_correlation=0.999), SPEC, MODEL, 0.99, 100)
ONE = dict(samples=1, elites=1, policy_samples=1, iterations=1, horizon=2)


@pytest.fixture(scope="module")
def train():
    """An agent whose average policy, which evaluation acts by, differs from its policy."""
    state = jax.jit(AGENT.init)(jax.random.key(0))
    noisy = lambda x, seed: x + 0.5 * jax.random.normal(jax.random.key(seed), x.shape)
    average = jax.tree.map(lambda x: noisy(x, 1), state.actor_average)
    return state._replace(actor_average=average, params=jax.tree.map(lambda x: noisy(x, 2), state.params))


def planning(name: str, fields: dict[str, Any], greedy: bool = False, agent=AGENT):
    simulator = dreamer.make_simulator(CONFIG, SPEC, MODEL, 1.0)
    if greedy:
        sample = simulator.policy
        simulator = simulator._replace(policy=lambda params, features, key: sample(params, features, None))
    factory = load_factory("--planner", name, planners.REGISTRY)
    rule = factory(override(config_type(factory)(), fields), SPEC.action)
    planner = make_planner(simulator, rule)
    return with_planner(agent, planner, make_objective(), partial(dreamer.acting_params, CONFIG))


def episode(agent, train, mode: str, steps: int = 4):
    """Actions [steps, E, A]; one environment begins an episode in the middle."""
    # A function of its own: all jits of one function share a cache.
    act, actor = jax.jit(lambda *args: agent.act(*args, mode)), agent.init_actor(train, E)
    rng, actions = np.random.default_rng(0), []
    for t in range(steps):
        obs = {"state": jnp.float32(rng.normal(size=(E, 3)))}
        first = jnp.array([t == 0, t == 0, t in (0, 2)])
        action, actor, info = act(train, actor, obs, first, jax.random.key(0))
        actions.append(action)
        assert info["latent"] is not None
    assert act._cache_size() == 1
    return np.stack(actions)


@pytest.mark.parametrize(("name", "fields"), [("policy", {}), ("mppi", ONE)], ids=["policy", "mppi"])
def test_a_search_of_one_sample_without_noise_is_the_policy(train, name, fields):
    """It is the mode of the policy that acts in evaluation, the averaged one, from the same acting state."""
    agent = planning(name, fields, greedy=True)
    ours = [agent.init_actor(train, E), AGENT.init_actor(train, E)]
    obs, first = {"state": jnp.ones((E, 3))}, jnp.ones(E, bool)
    agent_key = jax.random.split(jax.random.key(3))[0]
    planned = jax.jit(agent.act, static_argnums=5)(train, ours[0], obs, first, jax.random.key(3), "eval")
    acted = jax.jit(AGENT.act, static_argnums=5)(train, ours[1], obs, first, agent_key, "eval")
    np.testing.assert_allclose(planned[0], acted[0], rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, planned[1].agent.state, acted[1].state)
    np.testing.assert_array_equal(planned[1].agent.action, planned[0])


@pytest.mark.parametrize(("name", "fields"), [("policy", {}), ("mppi", ONE)], ids=["policy", "mppi"])
def test_a_planner_explores_by_the_noise_of_the_policy(train, name, fields):
    """Around the policy's own action that is what the policy does: with the same noise at the first step, and
    at the second, where it goes on from the first in all environments but the one that begins an episode."""
    ours, actor = planning(name, fields, greedy=True, agent=LASTING), LASTING.init_actor(train, E)
    mine, first, previous = ours.init_actor(train, E), jnp.ones(E, bool), 0.0
    act, acted = jax.jit(ours.act, static_argnums=5), jax.jit(LASTING.act, static_argnums=5)
    for step in range(2):
        obs, key = {"state": jnp.full((E, 3), 1.0 - step)}, jax.random.key(step)
        planned, mine, _ = act(train, mine, obs, first, key, "train")
        action, actor, info = acted(train, actor, obs, first, jax.random.split(key)[0], "train")
        np.testing.assert_allclose(planned, action, rtol=1e-5, atol=1e-6)
        moved = np.abs(actor.noise - previous).max(1)
        assert ((moved < 0.5) == ~np.asarray(first)).all() and jnp.abs(info["noise"]).min() > 0
        first, previous = jnp.array([False, False, True]), actor.noise


def test_planning_changes_the_actions_and_compiles_once(train):
    fields = dict(samples=8, elites=3, policy_samples=2, iterations=2, horizon=2)
    ours, actor = episode(planning("mppi", fields), train, "eval"), episode(AGENT, train, "eval")
    assert ours.shape == actor.shape and np.abs(ours).max() <= 1 and (ours != actor).all()
    assert (episode(planning("mppi", fields), train, "train") != episode(AGENT, train, "train")).all()


def test_a_collector_overwrites_the_previous_action(train):
    """As it does while exploring at random: the model then sees that action, not the planned one."""
    agent = planning("policy", {})
    act = jax.jit(agent.act, static_argnums=5)
    obs, no = {"state": jnp.ones((E, 3))}, jnp.zeros(E, bool)
    _, actor, _ = act(train, agent.init_actor(train, E), obs, ~no, jax.random.key(0), "eval")
    seen = [
        act(train, a, obs, no, jax.random.key(1), "eval")[1].agent.state["deter"]
        for a in (actor, actor._replace(action=-actor.action))
    ]
    assert (np.asarray(seen[0]) != np.asarray(seen[1])).any()


def test_samples_share_the_prefix_of_a_transformer():
    """No array of a plan is as large as a copy of the cached keys of one layer for every sample."""
    samples, window, width = 11, 32, 8
    model = transformer.make(TransformerConfig(width=width, layers=2, heads=2, window=window, **LATENT), SPEC)
    params = jax.eval_shape(model.init, jax.random.key(0))
    simulator, objective = simulator_of(model), make_objective()

    def score(params, state, actions):
        starts = simulator.starts(params, state)
        return evaluate(simulator, params, objective, starts, actions, (jax.random.key(0),) * 2)

    state = jax.eval_shape(lambda p: model.init_state(p, E), params)
    program = jax.make_jaxpr(score)(params, state, jnp.zeros((2, samples, 1, E, 2)))
    sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", str(program))]
    assert sizes.count(E * window * width) > 0  # the cache itself
    assert max(sizes) < samples * E * window * width


def test_the_true_model_is_the_environment():
    """A rollout of two candidates in two environments scores what the environment pays."""
    env = envs.make_jax("pendulum_dense", max_steps=3)
    simulator, keys = simulator_of_env(env), jax.random.split(jax.random.key(0), 2)
    state = EnvState(*jax.vmap(env.reset)(keys))
    actions = jax.random.uniform(jax.random.key(1), (5, 2, 1, 2, 1), minval=-1.0)
    scores = evaluate(simulator, (), make_objective(0.9), Starts((), state), actions, (keys[0], keys[0]))
    for n, e in np.ndindex(2, 2):
        now, total = jax.tree.map(lambda x: x[e], state.env), 0.0
        for t in range(5):  # the time limit of three steps does not end a plan
            now, timestep = env.step(now, actions[t, n, 0, e], keys[0])
            total += 0.9**t * float(timestep.reward)
        assert float(scores[n, 0, e]) == pytest.approx(total, rel=1e-4)
