"""The compiled programs of a run: each compiled once, buffers handed over, both collectors alike, and a clock
that promises whole numbers.
"""

from __future__ import annotations

import dataclasses
import logging
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbrl.collect import HostCollector, collect_device, init_device, renew
from mbrl.drivers import DeviceDriver, HostDriver, Source
from mbrl.envs.pool import HostPool
from mbrl.errors import UserError
from mbrl.programs import LoopConfig, all_finite, make_clock
from mbrl.seeds import Seeds
from mbrl.types import Agent, ArraySpec, EnvSpec, JaxEnv, TimeStep
from tests.helpers import as_numpy, tiny_run

LENGTH, E = 5, 3
SPEC = EnvSpec(
    "echo", {"echo": ArraySpec((2,)), "step": ArraySpec((), "int32", 8)}, ArraySpec((2,)), 1, LENGTH
)

# An environment that shows everything: the action it was given, and the steps since its reset. The reward is ten
# times the first action. Episodes of 5 steps end by a terminal where the last first action is positive, else by
# truncation. Once for the device, once for the host.


def echo_env() -> JaxEnv:
    def timestep(step, action):
        last = step >= LENGTH
        return TimeStep({"echo": action, "step": step}, 10 * action[0], last, last & (action[0] > 0))

    def reset(key):
        step = jnp.zeros((), jnp.int32)
        return step, timestep(step + 0, jnp.zeros(2))

    def step(state, action, key):
        return state + 1, timestep(state + 1, action)

    return JaxEnv(SPEC, reset, step)


class EchoHost:
    spec = SPEC

    def __init__(self):
        self.count = 0

    def _timestep(self, action) -> TimeStep:
        last = self.count >= LENGTH
        action = np.asarray(action, np.float32)
        obs = {"echo": action, "step": np.int32(self.count)}
        return TimeStep(obs, np.float32(10) * action[0], last, bool(last and action[0] > 0))

    def reset(self) -> TimeStep:
        self.count = 0
        return self._timestep(np.zeros(2))

    def step(self, action) -> TimeStep:
        self.count += 1
        return self._timestep(action)

    def get_state(self):
        return {"count": np.array(self.count)}

    def set_state(self, state):
        self.count = int(state["count"])

    def render(self, height, width):
        raise RuntimeError("nothing to see")

    def close(self): ...


# Collectors ------------------------------------------------------------------------------------------------


class ScriptedActor(NamedTuple):
    """How often each environment's policy was called, and its last action."""

    calls: jax.Array
    action: jax.Array


def scripted_agent() -> Agent:
    """Actions are a fixed function of how often the policy was called and of what it was shown, so that both
    collectors must ask the same questions to get the same rows."""

    def act(train, actor, obs, is_first, key, mode):
        calls = actor.calls + 1
        phase = calls.astype(jnp.float32) + 10 * jnp.arange(calls.shape[0])
        seen = obs["echo"].sum(-1) + obs["step"] + 0.5 * is_first
        action = jnp.stack([jnp.sin(phase), jnp.cos(phase + seen)], -1)
        return action, ScriptedActor(calls, action), {"latent": {"calls": calls}}

    def init_actor(train, batch):
        return ScriptedActor(jnp.zeros(batch, jnp.int32), jnp.zeros((batch, 2)))

    return Agent(lambda key: (), init_actor, act, lambda *args: pytest.fail("collectors do not learn"))


@pytest.fixture(scope="module")
def device_rows():
    """Two calls of 13 steps on the device: rows [26, E, ...] and the episodes of both."""
    agent, env = scripted_agent(), echo_env()
    collect = jax.jit(
        lambda actor, carry, key: collect_device(env, agent, (), actor, carry, key, 13, explore=False)
    )
    actor, carry, parts = agent.init_actor((), E), init_device(env, E, jax.random.key(0)), []
    for i in range(2):
        actor, carry, rows, episodes = collect(actor, carry, jax.random.key(i))
        parts.append(as_numpy((rows, episodes)))
    assert collect._cache_size() == 1
    return joined(parts, 0)


def joined(parts, axis: int):
    rows = jax.tree.map(lambda *xs: np.concatenate(xs, axis), *[p[0] for p in parts])
    return rows, jax.tree.map(lambda *xs: np.sum(xs, 0), *[p[1] for p in parts])


def host_collector(seeds: int = 2) -> HostCollector:
    return HostCollector(HostPool([EchoHost() for _ in range(seeds * E)]), seeds, E)


def host_collect(collector: HostCollector, actor, steps: int):
    """(actor, (rows with latents [S, steps, E, ...], episodes))"""
    agent = scripted_agent()

    def act(actor, obs, is_first, i):
        run = lambda *args: agent.act((), *args, jax.random.key(0), "train")
        action, actor, info = jax.vmap(run)(actor, obs, is_first)
        return action, actor, info["latent"]

    actor, rows, latents, episodes = collector.collect(act, actor, steps)
    latent = jax.tree.map(lambda *xs: np.stack([np.asarray(x) for x in xs], 1), *latents)
    return actor, (rows._replace(latent=latent), episodes)


@pytest.fixture(scope="module")
def host_rows():
    """The same on the host, for two seeds at once: [2, 26, E, ...]."""
    collector, parts = host_collector(), []
    actor = jax.vmap(lambda _: scripted_agent().init_actor((), E))(jnp.arange(2))
    for _ in range(2):
        actor, part = host_collect(collector, actor, 13)
        parts.append(part)
    return joined(parts, 1)


def test_collectors_give_the_same_rows(device_rows, host_rows):
    """Every field of every row, its dtype, and the episodes: the host's numbers are the device's."""
    for seed in range(2):
        for a, b in zip(
            jax.tree.leaves(device_rows), jax.tree.leaves(jax.tree.map(lambda x: x[seed], host_rows))
        ):
            np.testing.assert_allclose(a, b, atol=1e-6)
    dtypes = lambda rows: jax.tree.map(lambda x: x.dtype, rows)
    assert dtypes(device_rows[0]) == dtypes(host_rows[0])


@pytest.mark.parametrize("where", ["device", "host"])
def test_rows(where, device_rows, host_rows):
    """What a row means: the action that led to its observation, the reward on arrival; final observations are
    stored; a reset is one row with no action and no reward; nothing is lost between two calls."""
    rows, episodes = device_rows if where == "device" else jax.tree.map(lambda x: x[0], host_rows)
    assert rows.reward.shape == (26, E)
    assert rows.is_first[0].all()
    first, last = rows.is_first, rows.is_last
    assert (first[1:] == last[:-1]).all(), "after a last row comes the first of the next episode"
    assert (rows.action[first] == 0).all() and (rows.reward[first] == 0).all() and not last[first].any()
    np.testing.assert_array_equal(rows.obs["step"], np.tile(np.arange(26)[:, None] % (LENGTH + 1), E))
    assert (last == (rows.obs["step"] == LENGTH)).all(), "the final observation is a row"
    np.testing.assert_array_equal(rows.obs["echo"], rows.action)
    np.testing.assert_allclose(rows.reward, 10 * rows.action[..., 0], rtol=1e-6)
    assert (rows.is_terminal == (last & (rows.reward > 0))).all()
    assert rows.is_terminal.any() and (last & ~rows.is_terminal).any(), "the case must have both ends"
    # One call of the policy per row, and its latent is that of the row's observation.
    np.testing.assert_array_equal(rows.latent["calls"], np.tile(np.arange(1, 27)[:, None], E))
    count, total = last.sum(), rows.reward[: 4 * (LENGTH + 1)].sum()
    assert episodes.count == count == 4 * E and episodes.returns == pytest.approx(total, rel=1e-5)


def test_exploring_rows_hold_the_actions_taken():
    """Uniform actions replace the policy's in the row, in the environment and in the policy's own memory."""
    env, agent = echo_env(), scripted_agent()
    collect = jax.jit(
        lambda actor, carry, key: collect_device(env, agent, (), actor, carry, key, 40, explore=True)
    )
    actor, carry, rows, _ = collect(
        agent.init_actor((), E), init_device(env, E, jax.random.key(0)), jax.random.key(1)
    )
    rows, actions = as_numpy(rows), np.asarray(rows.action)[~np.asarray(rows.is_first)]
    np.testing.assert_array_equal(rows.obs["echo"], rows.action)
    assert (np.abs(actions) <= 1).all() and 0.4 < actions.std() < 0.75 and abs(actions.mean()) < 0.2
    np.testing.assert_array_equal(
        np.asarray(actor.action)[~np.asarray(carry.is_first)], carry.action[~carry.is_first]
    )


def numbered_env(costly: bool) -> JaxEnv:
    """Episodes of 5 steps that show a number drawn at their start."""

    def timestep(number, step):
        obs = {"echo": jnp.stack([number, number]), "step": step}
        return TimeStep(obs, jnp.zeros(()), step >= LENGTH, jnp.zeros((), bool))

    def reset(key):
        number, step = jax.random.uniform(key), jnp.zeros((), jnp.int32)
        return (number, step), timestep(number, jnp.copy(step))

    def step(state, action, key):
        return (state[0], state[1] + 1), timestep(state[0], state[1] + 1)

    return JaxEnv(SPEC, reset, step, costly)


@pytest.mark.parametrize("rows", [1, 4, LENGTH + 1])
def test_costly_resets_are_drawn_in_advance_and_used_once(rows):
    """However iterations and episodes overlap: no two episodes of any environment start alike."""
    env, agent = numbered_env(True), scripted_agent()

    def iteration(actor, carry, i):
        carry = renew(env, carry, jax.random.fold_in(jax.random.key(7), i), rows, i)
        key = jax.random.fold_in(jax.random.key(8), i)
        return collect_device(env, agent, (), actor, carry, key, rows, explore=False)

    step, actor, carry = jax.jit(iteration), agent.init_actor((), E), init_device(env, E, jax.random.key(0))
    parts = []
    for i in range(-(-10 * (LENGTH + 1) // rows)):
        actor, carry, out, _ = step(actor, carry, i)
        parts.append(as_numpy(out))
    shown = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
    assert (shown.is_first.sum(0) >= 10).all()
    starts = shown.obs["echo"][shown.is_first][:, 0]
    assert len(set(starts.tolist())) == len(starts)


def test_costly_resets_are_a_branch_for_several_seeds():
    """They would run at every step if the branch became a selection under vmap."""

    def collect(env):
        carries = jax.vmap(lambda key: init_device(env, E, key))(jax.random.split(jax.random.key(0), 2))
        one = lambda carry, i: renew(env, carry, jax.random.key(1), 4, i)
        return str(jax.make_jaxpr(lambda carry, i: jax.vmap(one, (0, None))(carry, i))(carries, 3))

    assert collect(numbered_env(True)).count("cond[") == 1
    assert "cond[" not in collect(numbered_env(False))


def test_host_collector_resumes(host_rows):
    """A new collector with the saved state goes on exactly where the old one stopped, inside an episode too."""
    actor = jax.vmap(lambda _: scripted_agent().init_actor((), E))(jnp.arange(2))
    before = host_collector()
    actor, first = host_collect(before, actor, 9)
    after = host_collector()
    after.set_state({k: np.array(v) for k, v in before.get_state().items()})
    _, second = host_collect(after, actor, 17)
    rows, episodes = joined([first, second], 1)
    for a, b in zip(jax.tree.leaves((rows, episodes)), jax.tree.leaves(host_rows)):
        np.testing.assert_array_equal(a, b)


# Compilation and donation ----------------------------------------------------------------------------------


def make_driver(where: str, seeds: Seeds):
    run = tiny_run(Source(SPEC, echo_env() if where == "device" else None, lambda seed: EchoHost()), seeds)
    programs = run.programs()
    if where == "device":
        return run, programs, DeviceDriver(programs, 1)
    pool = HostPool([EchoHost() for _ in range(len(seeds) * run.config.num_envs)])
    return run, programs, HostDriver(programs, pool, seeds, run.config.num_envs, run.clock.rows)


USED = {"device": ["init", "prefill", "chunk"], "host": ["init", "act", "act_random", "store", "learn"]}


@pytest.mark.parametrize("where", USED)
def test_each_program_compiles_once(where, caplog):
    """Five iterations of a whole run, prefill included: one entry in each program's cache, nothing else is ever
    compiled after the first iteration of each kind. Buffers of the state are handed over. Two seeds on two
    devices."""
    seeds = Seeds.make(0, 2)
    run, programs, driver = make_driver(where, seeds)
    keys = seeds.keys()
    state = programs.init(keys)
    for i in range(5):
        before, learning = jax.tree.leaves(state), i >= run.clock.prefill
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            state, metrics, episodes = driver.advance(state, keys, i, learning)
        compiled = [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
        assert bool(compiled) == (i in (0, run.clock.prefill)), compiled
        assert (metrics is not None) == learning and episodes.count.shape == (2,)
        # The clock's key and constants may survive; what is large may not.
        alive = sum(x.nbytes for x in before if not x.is_deleted())
        assert (
            alive == 0 if where == "device" else alive <= sum(x.nbytes for x in jax.tree.leaves(state.actor))
        )
    assert {name: getattr(programs, name)._cache_size() for name in USED[where]} == dict.fromkeys(
        USED[where], 1
    )
    assert state.train.updates.tolist() == [3 * run.clock.updates] * 2
    assert np.asarray(state.replay.inserted).tolist() == [5 * run.clock.rows] * 2
    assert all(x.shape == (2,) and np.isfinite(x).all() for x in metrics.values())
    rows = as_numpy(state.replay.data)
    np.testing.assert_array_equal(rows.obs["echo"], rows.action)
    # On the host: several reductions over two CPU devices at once can wait for each other for ever.
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(as_numpy(state.train)))


# The clock -------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 17),
    st.sampled_from([1, 2, 8, 16]),
    st.sampled_from([2, 16, 64]),
    st.sampled_from([0.5, 1, 2, 32, 64.5, 100, 256, 512, 1000]),
    st.integers(0, 3000),
    st.integers(1, 10),
)
def test_clock_keeps_the_train_ratio(envs, batch, length, ratio, prefill, chunk):
    """Whatever the numbers: exactly ``train_ratio`` replayed steps per agent step, a prefill that fills a
    sequence, whole chunks, at least what was asked for and not a chunk more."""
    config = LoopConfig(
        num_envs=envs, batch_size=batch, batch_length=length, train_ratio=ratio, prefill=prefill, chunk=chunk
    )
    steps = 50_000_000
    clock = make_clock(config, steps, length + 1)
    assert clock.updates >= 1 and clock.rows >= 1
    assert Fraction(clock.updates * batch * length, clock.rows * envs) == Fraction(ratio)
    assert clock.prefill % chunk == clock.total % chunk == 0
    assert clock.prefill * clock.rows >= length + 1 and clock.prefill * clock.rows * envs >= prefill
    assert clock.frames == clock.rows * envs * config.action_repeat
    assert steps <= clock.total * clock.frames < steps + chunk * clock.frames
    assert clock.capacity >= length + 1 and clock.capacity >= clock.rows
    assert clock.total_updates == (clock.total - clock.prefill) * clock.updates


GOOD = LoopConfig()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"collect_steps": 3, "num_envs": 1, "train_ratio": 100.0}, "loop.train_ratio"),
        ({"train_ratio": 0.0}, "loop.train_ratio"),
        ({"train_ratio": float("nan")}, "loop.train_ratio"),
        ({"train_ratio": 0.123457, "num_envs": 1}, "loop.train_ratio"),
        ({"num_envs": 0}, "loop.num_envs"),
        ({"batch_length": 1}, "loop.batch_length"),
        ({"replay_size": 100}, "loop.replay_size"),
        ({"prefill": 10_000_000}, "loop.prefill"),
        ({"freeze_after": 0}, "loop.freeze_after"),
        ({"pretrain": -1}, "loop.pretrain"),
    ],
)
def test_impossible_clocks_are_refused(changes, message):
    """One sentence that names the flag; the defaults themselves are possible."""
    make_clock(GOOD, 500_000, 65)
    with pytest.raises(UserError, match=message):
        make_clock(dataclasses.replace(GOOD, **changes), 500_000, 65)


def test_burst_of_updates_counts_from_the_first_iteration_that_learns():
    """A checkpoint at the end of prefill lies before it, every later one behind it."""
    clock = make_clock(dataclasses.replace(GOOD, pretrain=7), 500_000, 65)
    assert clock.updates_until(clock.prefill) == 0
    assert clock.updates_until(clock.prefill + 2) == 7 + 2 * clock.updates
    assert clock.total_updates == 7 + (clock.total - clock.prefill) * clock.updates


def test_all_finite():
    """Finds one NaN or infinity anywhere, of either sign; integers and huge numbers are fine."""
    good = {"a": jnp.full((3, 2), 3e38), "n": jnp.arange(3), "b": jnp.zeros(())}
    assert all_finite(good)
    for value in (jnp.nan, jnp.inf, -jnp.inf):
        for name in ("a", "b"):
            bad = {**good, name: good[name].at[(0,) * good[name].ndim].set(value)}
            assert not all_finite(bad) and not jax.jit(all_finite)(bad)
