"""A tiny Dreamer learns the probe environments, whose optimum is known exactly (mbrl/envs/probes.py).

Each probe isolates one ability, so a failure names its cause: value and discount (constant), ends against time
limits (constant_truncated), reward prediction (observation), credit over time (delayed), the policy (action),
memory (memory). All probes are padded to one shape, so that two compiled updates serve them all: the actor's
gradient through the dynamics for continuous actions, REINFORCE for discrete ones.
"""

from __future__ import annotations

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl import envs, evaluation
from mbrl.agents import dreamer
from mbrl.agents.dreamer import DreamerConfig
from mbrl.collect import collect_device, init_device
from mbrl.distributions import two_hot
from mbrl.drivers import Source
from mbrl.networks import MLP
from mbrl.optimisers import OptimiserConfig
from mbrl.programs import ACT, ENVS, LoopConfig, make_clock, stream
from mbrl.seeds import Seeds
from mbrl.train import Run
from mbrl.types import ArraySpec, EnvSpec, JaxEnv, TimeStep
from world_models import rssm
from world_models.rssm import RSSMConfig

G = 0.9
MODEL = RSSMConfig(
    stoch=4,
    classes=4,
    units=32,
    deter=32,
    hidden=32,
    blocks=1,
    prior_layers=1,
    encoder_layers=1,
    decoder_layers=1,
    bins=41,
    bin_limit=3.0,
    discount=G,
)
AGENT = DreamerConfig(
    units=32,
    actor_layers=1,
    critic_layers=1,
    horizon=4,
    bins=41,
    bin_limit=3.0,
    imag_starts=32,
    replay_bootstrap="value",
    replay_context=False,
    slow_rate=0.1,
    entropy=0.01,
    scale_rec=10.0,
    scale_reward=10.0,
    optimiser=OptimiserConfig("adam", learning_rate=3e-3, warmup=50, agc=0.0, clip_norm=10.0, eps=1e-8),
)
# Iterations of 8 rows in 8 environments and 32 updates on 16 x 8.
LOOP = LoopConfig(num_envs=8, batch_size=16, batch_length=8, train_ratio=64.0, collect_steps=8, prefill=512)
FEATURES, LONGEST = 2, 6
BEHAVIOUR = {
    "continuous": {"actor_grad": "dynamics"},
    "discrete": {"actor_grad": "reinforce", "entropy": 0.03},
}


def padded(env: JaxEnv) -> JaxEnv:
    """The same probe with observations of FEATURES entries."""

    def pad(timestep: TimeStep) -> TimeStep:
        state = timestep.obs["state"]
        return timestep._replace(obs={"state": jnp.pad(state, (0, FEATURES - state.shape[0]))})

    def reset(key):
        state, timestep = env.reset(key)
        return state, pad(timestep)

    def step(state, action, key):
        state, timestep = env.step(state, action, key)
        return state, pad(timestep)

    spec = EnvSpec("probe", {"state": ArraySpec((FEATURES,))}, env.spec.action, 1, env.spec.max_steps)
    return JaxEnv(spec, reset, step)


class Learner:
    """Programs that all probes of one kind of action share: initialisation, updates, and what the agent thinks."""

    def __init__(self, kind: str):
        self.seeds = Seeds.make(0, 2)
        action = ArraySpec((1,)) if kind == "continuous" else ArraySpec((2,), classes=2)
        spec = EnvSpec("probe", {"state": ArraySpec((FEATURES,))}, action)
        config = dataclasses.replace(AGENT, **BEHAVIOUR[kind])
        self.model = rssm.make(MODEL, spec)
        self.agent = dreamer.make(config, spec, self.model, G, total_updates=10_000)
        clock = make_clock(LOOP, 100_000, LOOP.batch_length)
        assert (clock.rows, clock.updates) == (8, 32)
        self.clock, self.keys = clock, self.seeds.keys()
        self.programs = Run(self.agent, Source(spec), self.seeds, LOOP, clock, LOOP.batch_length).programs()
        self.think = self.seeds.program(self._think, shared=(2, 3))

    def learn(self, env: JaxEnv, updates: int):
        """What learns [S], after ``updates`` gradient steps from scratch on a (padded) probe."""
        n, nothing = self.clock.rows, [()] * self.clock.rows
        begin = self.seeds.program(lambda key: init_device(env, LOOP.num_envs, stream(key, ENVS, 0)))

        def collect(train, actor, carry, key, i):
            key = stream(key, ACT, i)
            return collect_device(env, self.agent, train, actor, carry, key, n, explore=False)[:3]

        collect = self.seeds.program(collect, shared=(4,))
        state, carry = self.programs.init(self.keys), begin(self.keys)
        for i in range(self.clock.prefill + updates // self.clock.updates):
            step = np.int32(i)
            actor, carry, rows = collect(state.train, state.actor, carry, self.keys, step)
            state = state._replace(actor=actor)
            if i < self.clock.prefill:
                state = self.programs.store(state, rows, nothing)
            else:
                state, _ = self.programs.learn(state, rows, nothing, self.keys, step)
        return jax.block_until_ready(state.train)

    def _think(self, train, key, obs, action):
        """Value, reward and continue probability after every observation of one episode, all [LONGEST]."""
        critic = MLP(AGENT.critic_layers, AGENT.units, AGENT.bins, outscale=0.0)

        def body(state, inputs):
            obs, action, is_first, key = inputs
            state = self.model.observe_step(
                train.params["model"], state, action[None], {"state": obs[None]}, is_first[None], key
            )
            features = self.model.features(train.params["model"], state)
            value = two_hot(
                critic.apply({"params": train.params["critic"]}, features), AGENT.bin_limit
            ).mean()
            said = self.model.predict(train.params["model"], state)
            return state, (value[0], said.reward[0], said.cont[0])

        state = self.model.init_state(train.params["model"], 1)
        inputs = obs, action, jnp.arange(LONGEST) == 0, jax.random.split(key, LONGEST)
        return jax.lax.scan(body, state, inputs)[1]

    def opinions(self, train, observations):
        """Mean over seeds of (values, rewards, continues) along given observations, with idle actions."""
        obs = np.zeros((LONGEST, FEATURES), np.float32)
        for t, row in enumerate(observations):
            obs[t, : len(row)] = row
        said = self.think(train, self.keys, obs, np.zeros((LONGEST, 1), np.float32))
        return [np.asarray(x).mean(0)[: len(observations)] for x in said]


learner = cache(Learner)


def learn(name: str, updates: int, **options):
    """(learner, padded environment, what was learned)"""
    env = padded(envs.make_jax(name, **options))
    kind = "discrete" if env.spec.action.classes else "continuous"
    return learner(kind), env, learner(kind).learn(env, updates)


def score(name: str, updates: int, **options) -> np.ndarray:
    """Return of the deterministic policy per seed, mean of 128 episodes."""
    who, env, train = learn(name, updates, **options)
    return evaluation.make_device(who.agent, env, who.seeds, 128)(train, who.keys).mean(1)


def test_constant():
    """Reward 1 for five steps: the value at the start is the discounted sum, and falls as the end comes near,
    which only the memory can know."""
    who, _, train = learn("probe_constant", 1024)
    value, reward, cont = who.opinions(train, [[1.0]] * 6)
    assert value[0] == pytest.approx((1 - G**5) / (1 - G), abs=0.4)
    assert value[3] == pytest.approx((1 - G**2) / (1 - G), abs=0.8)
    assert (np.diff(value[:5]) < 0).all()
    np.testing.assert_allclose(reward, [0, 1, 1, 1, 1, 1], atol=0.1)
    np.testing.assert_allclose(cont[:4], G, atol=0.08)


def test_constant_truncated():
    """The same cut off by a time limit: the value is that of going on for ever, at every step. An agent that
    takes a time limit for an end finds 4 at the start and 0 at the end."""
    who, _, train = learn("probe_constant_truncated", 1536)
    value, _, cont = who.opinions(train, [[1.0]] * 6)
    np.testing.assert_allclose(value, 1 / (1 - G), atol=1.5)
    np.testing.assert_allclose(cont, G, atol=0.03)


def test_observation():
    """Reward +1 or -1 as shown: rewards and values have the observation's sign and size."""
    who, _, train = learn("probe_observation", 1536)
    for bit in (1.0, -1.0):
        value, reward, cont = who.opinions(train, [[bit], [bit]])
        assert value[0] == pytest.approx(bit, abs=0.3)
        np.testing.assert_allclose(reward, [0, bit], atol=0.15)
        np.testing.assert_allclose(cont, [G, 0], atol=0.1)


def test_delayed():
    """The bit shown first is paid two steps later: discounted once more at the start than one step after it,
    when it is visible no longer."""
    who, _, train = learn("probe_delayed", 1536)
    for bit in (1.0, -1.0):
        value, reward, _ = who.opinions(train, [[bit, 0.0], [0.0, 0.5], [0.0, 1.0]])
        assert value[0] == pytest.approx(G * bit, abs=0.15)
        assert value[1] == pytest.approx(bit, abs=0.15)
        np.testing.assert_allclose(reward, [0, 0, bit], atol=0.15)


def test_action():
    """Continuous actions near a shown target, through the dynamics. Optimum 1, the best constant action 0.6."""
    assert (score("probe_action", 1536) > 0.85).all()


def test_memory():
    """A cue that was hidden for two observations decides, through the dynamics. Optimum 1, without memory 0.5."""
    assert (score("probe_memory", 2048, gap=2) > 0.9).all()


def test_action_discrete():
    """Categories by REINFORCE. Optimum 1, the best constant action 0.5."""
    assert (score("probe_action_discrete", 1024) > 0.9).all()


def test_memory_discrete():
    """The cue decides between two categories, by REINFORCE. Optimum 1, without memory 0.5."""
    assert (score("probe_memory_discrete", 3072, gap=2) > 0.9).all()
