"""What every environment must do, written once for all. A new environment is one line in CASES."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl import envs
from mbrl.types import EnvSpec, JaxEnv, TimeStep


class Case(NamedTuple):
    """open(seed) -> an environment with the methods of HostEnv. end: "terminal", "truncated" or None for
    episodes without a fixed end. random: whether another seed shows another first observation. length: agent
    steps of an episode."""

    name: str
    open: Callable[[int], Any]
    end: str | None
    length: int | None
    random: bool = True


class JaxAsHost:
    """A JaxEnv with the methods of a HostEnv, jitted, so that one test serves both kinds."""

    def __init__(self, env: JaxEnv, seed: int):
        self.spec = env.spec
        self._reset, self._step = jax.jit(env.reset), jax.jit(env.step)
        self._key = jax.random.key(seed)
        self._state: Any = None

    def _next_key(self) -> jax.Array:
        self._key, key = jax.random.split(self._key)
        return key

    def reset(self) -> TimeStep:
        self._state, timestep = self._reset(self._next_key())
        return jax.tree.map(np.asarray, timestep)

    def step(self, action: np.ndarray) -> TimeStep:
        self._state, timestep = self._step(self._state, jnp.asarray(action, jnp.float32), self._next_key())
        return jax.tree.map(np.asarray, timestep)

    def get_state(self) -> dict[str, np.ndarray]:
        leaves = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(self._state))}
        return leaves | {"key": np.asarray(jax.random.key_data(self._key))}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        self._key = jax.random.wrap_key_data(jnp.asarray(state["key"]))
        shape = jax.eval_shape(self._reset, self._key)[0]
        leaves = [jnp.asarray(state[str(i)]) for i in range(len(jax.tree.leaves(shape)))]
        self._state = jax.tree.unflatten(jax.tree.structure(shape), leaves)

    def close(self) -> None: ...


def jax_case(name: str, end: str, length: int, random: bool = True, **options: Any) -> Case:
    return Case(name, lambda seed: JaxAsHost(envs.make_jax(name, **options), seed), end, length, random)


def host_case(task: str, length: int | None = 500, action_repeat: int = 2) -> Case:
    end = "truncated" if length else None
    return Case(task, lambda seed: envs.make_host(task, seed, action_repeat), end, length)


CASES = [
    jax_case("cartpole", "truncated", 500),
    jax_case("pendulum", "truncated", 500),
    jax_case("pendulum_dense", "truncated", 7, max_steps=7),
    jax_case("probe_constant", "terminal", 5, random=False),
    jax_case("probe_constant_truncated", "truncated", 5, random=False),
    jax_case("probe_observation", "terminal", 1),
    jax_case("probe_delayed", "terminal", 2),
    jax_case("probe_action", "terminal", 1),
    jax_case("probe_action_discrete", "terminal", 1),
    jax_case("probe_memory", "terminal", 4),
    jax_case("probe_memory_discrete", "terminal", 6, gap=5),
    jax_case("recall", "terminal", 7, gap=6),
    jax_case("tmaze", "terminal", 21),
    jax_case("hallway", "terminal", 6, width=6),
    jax_case("memory_chain", "terminal", 21),
    host_case("cartpole_swingup"),
    host_case("cup_catch"),
    host_case("walker_walk", 250, action_repeat=4),
    host_case("finger_turn_easy"),
    host_case("reacher_hard"),
    host_case("fish_swim", 200, action_repeat=5),
    host_case("lqr_2_1", None),
]
JAX_NAMES = list(envs.REGISTRY)
OPTIONAL = {"memory_chain": "gymnax"}
"""Environments that need a package which is not installed by default."""


@pytest.fixture(autouse=True)
def _has_what_it_needs(request):
    """Skips an environment whose optional package is missing."""
    case = request.getfixturevalue("case") if "case" in request.fixturenames else None
    name = case.name if case else request.node.callspec.params["name"]
    if package := OPTIONAL.get(name):
        pytest.importorskip(package)


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request) -> Case:
    return request.param


@pytest.fixture
def make(case):
    """make(seed) opens an environment of the case, and closes it after the test."""
    opened = []

    def open_one(seed: int):
        opened.append(case.open(seed))
        return opened[-1]

    yield open_one
    for env in opened:
        env.close()


def actions(spec: EnvSpec, count: int, seed: int = 0) -> np.ndarray:
    """Random actions float32 [count, A]; one-hot where the action is discrete."""
    rng = np.random.default_rng(seed)
    if spec.action.classes:
        return np.eye(spec.action.classes, dtype=np.float32)[rng.integers(spec.action.classes, size=count)]
    return rng.uniform(-1, 1, (count, *spec.action.shape)).astype(np.float32)


def play(env: Any, count: int, seed: int = 0) -> list[TimeStep]:
    """``count`` time steps after a reset, which comes first in the list; resets where an episode ends."""
    steps = [env.reset()]
    for action in actions(env.spec, count, seed):
        steps.append(env.reset() if steps[-1].is_last else env.step(action))
    return steps


def same(a: TimeStep, b: TimeStep) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def assert_matches(timestep: TimeStep, spec: EnvSpec) -> None:
    assert list(timestep.obs) == list(spec.obs) == sorted(spec.obs)
    for key, entry in spec.obs.items():
        assert timestep.obs[key].shape == entry.shape, key
        assert timestep.obs[key].dtype == entry.dtype, key
        assert np.isfinite(timestep.obs[key]).all(), key
    assert np.shape(timestep.reward) == np.shape(timestep.is_last) == np.shape(timestep.is_terminal) == ()
    assert timestep.reward.dtype == np.float32
    assert np.asarray(timestep.is_last).dtype == np.asarray(timestep.is_terminal).dtype == bool


def test_data_match_the_spec(make):
    env = make(0)
    assert len(env.spec.action.shape) == 1 and env.spec.action.dtype == "float32"
    assert env.spec.action.classes in (None, env.spec.action.size)
    for timestep in play(env, 12):
        assert_matches(timestep, env.spec)


def test_reset_has_no_reward_and_is_not_an_end(make):
    env = make(0)
    for _ in range(3):
        first = env.reset()
        assert first.reward == 0 and not first.is_last and not first.is_terminal
        env.step(actions(env.spec, 1)[0])


def test_episode_ends_when_and_how_the_spec_says(case, make):
    env = make(0)
    assert env.spec.max_steps == case.length
    if case.length is None:
        pytest.skip("episodes without a fixed end")
    for episode in range(1 if case.length > 10 else 3):
        env.reset()
        for t, action in enumerate(actions(env.spec, case.length, episode), start=1):
            timestep = env.step(action)
            assert bool(timestep.is_last) == (t == case.length)
            assert bool(timestep.is_terminal) == (t == case.length and case.end == "terminal")


def test_same_seed_same_data(make):
    assert all(map(same, play(make(3), 20), play(make(3), 20)))


def test_other_seeds_and_episodes_differ(case, make):
    if not case.random:
        pytest.skip("nothing is drawn")
    starts = {tuple(np.concatenate([v.ravel() for v in make(s).reset().obs.values()])) for s in range(8)}
    assert len(starts) > 1
    env = make(1)
    starts = {tuple(np.concatenate([v.ravel() for v in env.reset().obs.values()])) for _ in range(8)}
    assert len(starts) > 1


def test_actions_beyond_the_bounds_are_clipped(make):
    a, b = make(1), make(1)
    if a.spec.action.classes:
        pytest.skip("discrete actions")
    a.reset(), b.reset()
    for sign in np.sign(actions(a.spec, a.spec.max_steps or 5)[:5]):
        assert same(a.step(3 * sign), b.step(sign))


def test_state_round_trip_is_exact_also_through_a_reset(make, tmp_path):
    env = make(5)
    play(env, 7)
    np.savez(tmp_path / "state.npz", **env.get_state())
    other = make(6)
    with np.load(tmp_path / "state.npz", allow_pickle=False) as state:
        other.set_state(dict(state))

    def onward(env):
        steps = []
        for action in actions(env.spec, 5, 1):
            steps.append(env.step(action))
            if steps[-1].is_last:
                break
        return steps + play(env, 10, 2) + play(env, 10, 3)

    env.reset() if env.spec.max_steps == 1 else None
    other.reset() if env.spec.max_steps == 1 else None
    assert all(map(same, onward(env), onward(other)))


def test_observations_may_be_kept(make):
    env = make(0)
    first = env.reset()
    kept = {key: value.copy() for key, value in first.obs.items()}
    env.step(actions(env.spec, 1)[0])
    assert all(np.array_equal(first.obs[key], kept[key]) for key in kept)


# Environments written in JAX


@pytest.mark.parametrize("name", JAX_NAMES)
def test_jax_registry_has_a_case(name):
    assert name in {case.name for case in CASES}
    assert envs.make_jax(name).spec.name == name


@pytest.mark.parametrize("name", JAX_NAMES)
def test_vmap_equals_single(name):
    env = envs.make_jax(name)
    keys = jax.random.split(jax.random.key(0), 5)
    batch = jnp.asarray(actions(env.spec, 5))
    states, first = jax.jit(jax.vmap(env.reset))(keys)
    _, second = jax.jit(jax.vmap(env.step))(states, batch, keys)
    for i in range(5):
        state, alone = jax.jit(env.reset)(keys[i])
        assert same(jax.tree.map(lambda x, i=i: x[i], first), alone)
        _, alone = jax.jit(env.step)(state, batch[i], keys[i])
        assert_close(jax.tree.map(lambda x, i=i: x[i], second), alone)


def assert_close(a: TimeStep, b: TimeStep) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", JAX_NAMES)
def test_state_is_a_scan_carry_of_fixed_types(name):
    env = envs.make_jax(name)
    key, action = jax.random.key(0), jnp.zeros(env.spec.action.shape)
    state, first = jax.eval_shape(env.reset, key)
    after, second = jax.eval_shape(env.step, state, action, key)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.weak_type), after
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), first) == jax.tree.map(
        lambda x: (x.shape, x.dtype), second
    )


@pytest.mark.parametrize("name", JAX_NAMES)
def test_no_key_is_used_twice(name):
    env = envs.make_jax(name)

    def episode(key, action):
        reset_key, step_key = jax.random.split(key)
        state, first = env.reset(reset_key)
        return first, env.step(state, action, step_key)[1]

    with jax.debug_key_reuse(True):
        jax.jit(episode)(jax.random.key(0), jnp.asarray(actions(env.spec, 1)[0]))


@pytest.mark.parametrize("name", JAX_NAMES)
@pytest.mark.parametrize("jit", [False, True])
def test_no_two_leaves_share_a_buffer(name, jit):
    """Donating a state with one buffer in two leaves is refused."""
    env = envs.make_jax(name)
    wrap = jax.jit if jit else lambda function: function
    key, action = jax.random.key(0), jnp.zeros(env.spec.action.shape)
    first = wrap(env.reset)(key)
    for result in (first, wrap(env.step)(first[0], action, key)):
        leaves = jax.tree.leaves(result)
        assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)
