"""Many seeds in one program are the same runs as one by one, and cannot harm each other."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mbrl import envs
from mbrl.drivers import DeviceDriver, Source
from mbrl.seeds import Seeds
from tests.helpers import (
    as_numpy,
    assert_close,
    assert_same,
    on_one_device,
    one_seed,
    tiny_run,
    tiny_tdmpc_run,
)

ENV = envs.make_jax("pendulum", max_steps=6)
SOURCE = Source(ENV.spec, ENV)


class Runner:
    """The programs of a run on some seeds, compiled at first use."""

    def __init__(self, seeds: Seeds, make=tiny_run):
        self.run = make(SOURCE, seeds)
        self.driver = DeviceDriver(self.run.programs(), 1)

    def fill(self, keys):
        """The state after prefill, copied to the host."""
        state = self.driver.programs.init(keys)
        for i in range(self.run.clock.prefill):
            state, _, _ = self.driver.advance(state, keys, i, learning=False)
        return as_numpy(state)

    def learn(self, state, keys, iterations: int = 4, start: int = 0):
        """State and the metrics of every iteration, copied to the host."""
        state, metrics = jax.device_put(state, self.run.seeds.sharding), []
        for i in range(start, start + iterations):
            state, one, _ = self.driver.advance(state, keys, self.run.clock.prefill + i, learning=True)
            metrics.append(as_numpy(one))
        return as_numpy(state), metrics


KEYS = on_one_device(0, 1).keys()


@pytest.fixture(scope="module")
def vmapped() -> Runner:
    """Two seeds in one vmap."""
    return Runner(on_one_device(0, 1))


@pytest.fixture(scope="module")
def filled(vmapped):
    return vmapped.fill(KEYS)


@pytest.fixture(scope="module")
def healthy(vmapped, filled):
    """State and metrics after 8 updates without any accident."""
    return vmapped.learn(filled, KEYS)


@pytest.fixture(scope="module")
def alone():
    """(state after prefill, state and metrics after learning) of each seed in a run of its own, stacked. One
    program serves every single seed."""
    runner, parts = Runner(on_one_device(0)), []
    for seed in (0, 1):
        keys = on_one_device(seed).keys()
        start = runner.fill(keys)
        parts.append((start, *runner.learn(start, keys)))
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def test_batched_seeds_equal_seeds_alone(alone, filled, healthy):
    """Parameters, optimiser, replay, environments and metrics of each seed are those of a run of this seed
    alone, from its initialisation to its eighth update, but for the rounding of batched products."""
    start, state, metrics = alone
    assert_close(start, filled)
    assert_close(state, healthy[0])
    assert_close(metrics, healthy[1], 1e-4)
    assert healthy[0].train.updates.tolist() == [8, 8]


def test_seeds_in_turns_equal_seeds_alone(alone):
    """Seeds that share a CPU device take turns: bit-equal to runs of their own."""
    seeds = on_one_device(0, 1, loop=True)
    assert_same(Runner(seeds).learn(alone[0], seeds.keys()), alone[1:])


def test_seeds_over_devices_equal_seeds_alone(alone):
    """The seed axis sharded over two virtual devices: equal but for the rounding of a program that is compiled
    for two devices, and spread."""
    seeds = Seeds.make(0, 2)
    if len(seeds.mesh.devices) < 2:
        pytest.skip("needs two devices, virtual ones will do")
    sharded = Runner(seeds)
    state, metrics = sharded.learn(alone[0], seeds.keys())
    assert_close(state, alone[1])
    assert_close(metrics, alone[2], 1e-4)
    state = jax.device_put(alone[0], seeds.sharding)
    state, _, _ = sharded.driver.advance(state, seeds.keys(), 2, learning=True)
    assert all(x.sharding.is_equivalent_to(seeds.sharding, x.ndim) for x in jax.tree.leaves(state))


def test_planning_seeds_in_turns_equal_seeds_alone():
    """TD-MPC2 from its first random step over the burst of updates to planned actions: bit-equal to runs of
    their own. (Batched seeds round differently, and a planner's choice of the best turns rounding into another
    action.)"""
    together, alone = (Runner(on_one_device(*s, loop=True), tiny_tdmpc_run) for s in ((0, 1), (0,)))
    results = []
    for runner, members in ((together, [(0, 1)]), (alone, [(0,), (1,)])):
        parts = []
        for seeds in members:
            keys = on_one_device(*seeds).keys()
            state, _ = runner.driver.programs.pretrain(runner.fill(keys), keys)
            parts.append(runner.learn(as_numpy(state), keys, 2))
        results.append(jax.tree.map(lambda *xs: np.concatenate(xs), *parts))
    assert_same(*results)
    assert results[0][0].train.updates.tolist() == [6, 6]


def test_permuting_seeds_permutes_results(vmapped, filled, healthy):
    """To the last bit: nothing depends on a seed's place."""
    turn = lambda tree: jax.tree.map(lambda x: x[::-1], tree)
    state, metrics = vmapped.learn(turn(filled), KEYS[::-1])
    assert_same(turn(state), healthy[0])
    assert_same(turn(metrics), healthy[1])


def test_seeds_differ(healthy):
    """Different seeds are different runs in everything random: networks, environments, actions."""
    a, b = (one_seed(healthy[0], i) for i in range(2))
    for pick in (lambda s: s.train.params, lambda s: s.env.timestep.obs, lambda s: s.replay.data.action):
        assert any((x != y).any() for x, y in zip(jax.tree.leaves(pick(a)), jax.tree.leaves(pick(b))))


def test_members_do_not_depend_on_the_number_of_seeds():
    """Member k of a run with more seeds has the key of the seed first + k, alone or not."""
    four, one = Seeds.make(3, 4), Seeds.make(5, 1)
    assert four.seeds == (3, 4, 5, 6)
    np.testing.assert_array_equal(jax.random.key_data(four.keys())[2], jax.random.key_data(one.keys())[0])


# NaN -------------------------------------------------------------------------------------------------------


def poison(tree, seed: int, value=np.nan):
    """The first floating-point leaf of one seed, filled with ``value``."""
    leaves, structure = jax.tree.flatten(tree)
    at = next(i for i, x in enumerate(leaves) if np.issubdtype(x.dtype, np.floating))
    leaves[at] = leaves[at].copy()
    leaves[at][seed] = value
    return structure.unflatten(leaves)


def test_nan_parameters_stay_in_their_seed(vmapped, filled, healthy):
    """A seed whose parameters are NaN: the other is bit-equal to a run without the accident, the broken one is
    frozen after ``freeze_after`` (3) rejected updates and changes no more."""
    broken = filled._replace(train=poison(filled.train, 1))
    state, metrics = vmapped.learn(broken, KEYS)
    assert_same(one_seed(state, 0), one_seed(healthy[0], 0))
    assert_same([one_seed(m, 0) for m in metrics], [one_seed(m, 0) for m in healthy[1]])
    assert_same(one_seed(state.train, 1), one_seed(broken.train, 1))
    assert state.health.rejected.tolist() == [0, 8]
    assert state.health.frozen.tolist() == [False, True]
    assert [m["frozen"][1] > 0 for m in metrics] == [False, True, True, True]
    assert metrics[-1]["rejected_updates"].tolist() == [0, 8]


def test_a_seed_freezes_at_the_update_that_was_one_too_many(vmapped, filled):
    """Its third rejected update in a row (``freeze_after``), neither the one before nor the one after."""
    broken = filled._replace(train=poison(filled.train, 1))
    for before, frozen in ((0, False), (1, True)):  # and two updates more
        health = broken.health._replace(consecutive=np.array([0, before], np.int32))
        state, _ = vmapped.learn(broken._replace(health=health), KEYS, 1)
        assert state.health.frozen.tolist() == [False, frozen]


def test_a_frozen_seed_stays_frozen(vmapped, filled):
    """Even when its updates become finite again: it is reported, not silently revived."""
    before = filled._replace(health=filled.health._replace(frozen=np.array([False, True])))
    state, _ = vmapped.learn(before, KEYS, 1)
    assert_same(one_seed(state.train, 1), one_seed(before.train, 1))
    assert state.train.updates.tolist() == [2, 0]
    assert state.health.rejected.tolist() == [0, 0]  # finite updates are not counted as rejected


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_batch_never_reaches_the_parameters(vmapped, filled, value):
    """NaN and infinite observations in one seed's replay: every update on them is rejected, parameters, slow
    critic, optimiser and stored latents of that seed stay as they were, the other seed is bit-equal. When the
    data are good again, learning goes on."""
    data = filled.replay.data
    broken = filled._replace(
        replay=filled.replay._replace(data=data._replace(obs=poison(data.obs, 1, value)))
    )
    state, _ = vmapped.learn(broken, KEYS, 1)
    assert_same(one_seed(state.train, 1), one_seed(broken.train, 1))
    assert state.health.rejected.tolist() == [0, 2] and state.health.consecutive.tolist() == [0, 2]
    assert_same(one_seed(state, 0), one_seed(vmapped.learn(filled, KEYS, 1)[0], 0))
    old, new = (s.replay.data.latent["deter"][1] for s in (broken, state))
    collected = np.arange(broken.replay.inserted[1], state.replay.inserted[1])
    assert len(collected) == 4
    np.testing.assert_array_equal(np.delete(new, collected, 0), np.delete(old, collected, 0))
    # Mended: one good update forgets the count.
    state, _ = vmapped.learn(state._replace(replay=filled.replay), KEYS, 1, start=1)
    assert state.health.consecutive.tolist() == [0, 0] and not state.health.frozen.any()
    assert state.train.updates.tolist() == [4, 2]


def test_a_nan_observation_stays_in_its_seed(vmapped, filled, healthy):
    """An environment of one seed shows NaN: the other seed is bit-equal, nothing that is not finite reaches the
    parameters, and the environment's next episode is sound again."""
    timestep = filled.env.timestep
    broken = filled._replace(env=filled.env._replace(timestep=timestep._replace(obs=poison(timestep.obs, 1))))
    state, metrics = vmapped.learn(broken, KEYS)
    assert_same(one_seed(state, 0), one_seed(healthy[0], 0))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.train))
    assert state.health.rejected[0] == 0 < state.health.rejected[1]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.actor, state.env)))


def test_episodes_heal_a_broken_memory(vmapped, filled):
    """An acting state that is not finite ends with its episode (6 steps): the seed acts and learns again."""
    broken = filled._replace(actor=poison(filled.actor, 1))
    state, _ = vmapped.learn(broken, KEYS, 2)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.actor, state.train, state.env)))
