"""The probes against what their docstrings promise: returns and values by simulation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl.envs import probes

G = 0.9


def play(env, policy, seed: int):
    """Observations [L + 1, F] and rewards [L] of an episode under policy(observations so far) -> action."""
    step, key = env.step, jax.random.key(seed)
    state, timestep = env.reset(key)
    seen, rewards = [np.asarray(timestep.obs["state"])], []
    while not timestep.is_last:
        state, timestep = step(state, jnp.asarray(policy(seen), jnp.float32), key)
        seen.append(np.asarray(timestep.obs["state"]))
        rewards.append(float(timestep.reward))
    return np.array(seen), np.array(rewards)


def value(rewards, t: int) -> float:
    """The discounted sum of what is received after t steps."""
    return float(sum(G**i * reward for i, reward in enumerate(rewards[t:])))


def idle(seen):
    return np.zeros(1)


def test_constant():
    _, rewards = play(probes.constant(5), idle, 0)
    assert rewards.sum() == 5
    for t in range(6):
        assert value(rewards, t) == pytest.approx((1 - G ** (5 - t)) / (1 - G))


@pytest.mark.parametrize("truncate", [False, True])
def test_constant_ends_or_is_cut(truncate):
    env, key = probes.constant(2, truncate), jax.random.key(0)
    state, _ = env.reset(key)
    for last in (False, True):
        state, timestep = env.step(state, jnp.zeros(1), key)
        assert bool(timestep.is_last) == last
        assert bool(timestep.is_terminal) == (last and not truncate)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("length", [1, 3])
def test_observation(seed, length):
    seen, rewards = play(probes.observation(length), idle, seed)
    bit = seen[0, 0]
    assert abs(bit) == 1 and (seen == bit).all() and rewards.sum() == length * bit
    for t in range(length):
        assert value(rewards, t) == pytest.approx(bit * (1 - G ** (length - t)) / (1 - G))


@pytest.mark.parametrize("seed", range(4))
def test_delayed(seed):
    seen, rewards = play(probes.delayed(), idle, seed)
    bit = seen[0, 0]
    np.testing.assert_array_equal(seen, [[bit, 0], [0, 0.5], [0, 1]])
    np.testing.assert_array_equal(rewards, [0, bit])
    assert value(rewards, 0) == pytest.approx(G * bit) and value(rewards, 1) == bit


def one_hot(bit):
    return np.eye(2)[int(bit > 0)]


@pytest.mark.parametrize("seed", range(6))
def test_action(seed):
    seen, best = play(probes.action(), lambda seen: seen[-1], seed)
    assert best == pytest.approx([1]) and abs(seen[0, 0]) <= 0.8 and len(seen) == 2
    _, beyond = play(probes.action(), lambda seen: [9.0], seed)
    assert beyond == pytest.approx([1 - abs(1 - seen[0, 0])])
    _, best = play(probes.action_discrete(), lambda seen: one_hot(seen[-1][0]), seed)
    _, worst = play(probes.action_discrete(), lambda seen: one_hot(-seen[-1][0]), seed)
    assert best == [1] and worst == [0]


def test_best_constant_action():
    env = probes.action()

    def reward(key, action):
        return env.step(env.reset(key)[0], action[None], key)[1].reward

    keys, candidates = jax.random.split(jax.random.key(0), 20000), jnp.linspace(-1, 1, 21)
    means = jax.vmap(lambda action: jax.vmap(lambda key: reward(key, action))(keys).mean())(candidates)
    assert float(means.max()) == pytest.approx(0.6, abs=0.01)
    assert abs(float(candidates[means.argmax()])) < 0.11


@pytest.mark.parametrize("gap", [1, 3])
@pytest.mark.parametrize("discrete", [False, True])
def test_memory(gap, discrete):
    env = probes.memory(gap, discrete)
    assert env.spec.max_steps == gap + 1

    def say(bit):
        return one_hot(bit) if discrete else np.array([0.3 * bit])

    cues = set()
    for seed in range(6):
        seen, rewards = play(env, lambda seen: say(seen[0][0]), seed)
        cues.add(seen[0, 0])
        assert not seen[1:, 0].any(), "the cue is hidden"
        np.testing.assert_array_equal(seen[:, 1], np.arange(gap + 2) == gap)
        np.testing.assert_array_equal(rewards, np.arange(gap + 1) == gap)
        for t in range(gap + 1):
            assert value(rewards, t) == pytest.approx(G ** (gap - t))
        _, wrong = play(env, lambda seen: say(-seen[0][0]), seed)
        assert not wrong.any()
    assert cues == {-1.0, 1.0}


def test_memory_without_memory_earns_half():
    env = probes.memory(2)

    def total(key):
        state, _ = env.reset(key)
        rewards = []
        for _ in range(3):
            state, timestep = env.step(state, jnp.ones(1), key)
            rewards.append(timestep.reward)
        return sum(rewards)

    mean = jax.vmap(total)(jax.random.split(jax.random.key(0), 10000)).mean()
    assert float(mean) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("make", [lambda: probes.memory(0), lambda: probes.constant(0)])
def test_impossible_lengths(make):
    with pytest.raises(ValueError, match="at least 1, found 0"):
        make()
