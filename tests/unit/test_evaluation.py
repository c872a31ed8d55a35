"""Evaluation: the policy's mode, whole episodes only, the same start states every time, on both sides."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl import evaluation
from mbrl.drivers import Source, host_seed, make_pool
from mbrl.types import Agent, Array, ArraySpec, EnvSpec, JaxEnv, TimeStep
from tests.helpers import on_one_device, rng_words, set_rng

EPISODES, LONGEST = 4, 7
SPEC = EnvSpec("lengths", {"left": ArraySpec((1,))}, ArraySpec((1,)), 1, LONGEST)
SEEDS = on_one_device(0, 1)

# An episode is as long as its reset says, from 1 to 7 steps, and pays 1 + the action at every step, at those
# after its end too. So a return is the length times (1 + action).


def lengths_env() -> JaxEnv:
    def show(left, reward):
        return TimeStep({"left": left[None].astype(jnp.float32)}, reward, left <= 0, left <= 0)

    def reset(key):
        left = jax.random.randint(key, (), 1, LONGEST + 1)
        return left, show(left, jnp.zeros(()))

    def step(left, action, key):
        return left - 1, show(left - 1, 1 + action[0])

    return JaxEnv(SPEC, reset, step)


def endless(env: JaxEnv) -> JaxEnv:
    """The same without ends and without a time limit."""

    def step(state, action, key):
        state, timestep = env.step(state, action, key)
        no = jnp.zeros((), bool)
        return state, timestep._replace(is_last=no, is_terminal=no)

    return JaxEnv(dataclasses.replace(env.spec, max_steps=None), env.reset, step)


class LengthsHost:
    spec = SPEC

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.left = 0

    def show(self, reward) -> TimeStep:
        obs = {"left": np.array([self.left], np.float32)}
        return TimeStep(obs, np.float32(reward), self.left <= 0, self.left <= 0)

    def reset(self) -> TimeStep:
        self.left = int(self.rng.integers(1, LONGEST + 1))
        return self.show(0)

    def step(self, action) -> TimeStep:
        self.left -= 1
        return self.show(1 + action[0])

    def get_state(self):
        return {"left": np.array(self.left), "rng": rng_words(self.rng)}

    def set_state(self, state):
        self.left = int(state["left"])
        set_rng(self.rng, state["rng"])

    def render(self, height, width):
        raise RuntimeError

    def close(self): ...


class Actor(NamedTuple):
    action: Array


def agent() -> Agent:
    """Acts with its only parameter in evaluation, and never otherwise."""

    def act(train, actor, obs, is_first, key, mode):
        assert mode == "eval"
        action = jnp.full((obs["left"].shape[0], 1), train)
        return action, Actor(action), {"latent": ()}

    init_actor = lambda train, batch: Actor(jnp.zeros((batch, 1)))
    return Agent(lambda key: jnp.zeros(()), init_actor, act, lambda *args: None)


def test_device_counts_whole_episodes_and_nothing_after_them():
    """Also the same returns at every evaluation, because the start states are."""
    evaluate = evaluation.make_device(agent(), lengths_env(), SEEDS, EPISODES)
    keys = SEEDS.keys()
    ones = evaluate(jnp.zeros(2), keys)
    assert ones.shape == (2, EPISODES)
    resets = jax.vmap(lambda key: jax.random.split(jax.random.split(key)[0], EPISODES))(keys)
    lengths = jax.vmap(jax.vmap(lambda key: jax.random.randint(key, (), 1, LONGEST + 1)))(resets)
    np.testing.assert_array_equal(ones, lengths)
    assert len(np.unique(ones)) > 2
    np.testing.assert_allclose(evaluate(jnp.array([0.5, -1.0]), keys), ones * [[1.5], [0.0]])


def test_what_is_recorded_counts_the_same_steps(monkeypatch):
    """Of an episode that never ends, as many rewards as are evaluated, and one observation more."""
    monkeypatch.setattr(evaluation, "MAX_STEPS", 7)
    env = endless(lengths_env())
    returns = evaluation.make_device(agent(), env, SEEDS, EPISODES)(jnp.zeros(2), SEEDS.keys())
    again, played = evaluation.make_device(agent(), env, SEEDS, EPISODES, True)(jnp.zeros(2), SEEDS.keys())
    np.testing.assert_array_equal(returns, 7)
    np.testing.assert_array_equal(again, returns)
    assert played.reward.shape == (2, 8, EPISODES)
    np.testing.assert_array_equal(played.reward.sum(1), returns)


def test_host_counts_whole_episodes_and_nothing_after_them():
    source = Source(SPEC, make_host=lambda seed, index: LengthsHost(seed))
    evaluate = evaluation.make_host(agent(), make_pool(source, SEEDS, EPISODES, purpose=1), SEEDS, EPISODES)
    ones = evaluate(jnp.zeros(2), SEEDS.keys())
    made = [[LengthsHost(host_seed(seed, 1, i)) for i in range(EPISODES)] for seed in SEEDS.seeds]
    np.testing.assert_array_equal(ones, [[env.reset().obs["left"][0] for env in row] for row in made])
    np.testing.assert_allclose(evaluate(jnp.array([0.5, -1.0]), SEEDS.keys()), ones * [[1.5], [0.0]])


def test_host_environments_have_seeds_of_their_own():
    """Between members, environments, and the purposes training and evaluation."""
    seeds = {host_seed(s, p, i) for s in range(5) for p in range(2) for i in range(20)}
    assert len(seeds) == 200
