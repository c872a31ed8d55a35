"""Environments of other libraries on the device: how their episodes end, and names that they do not have."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl import envs
from mbrl.envs import brax_adapter
from mbrl.envs.adapters import contain, in_range, typed
from mbrl.types import TimeStep


def test_a_fallen_pole_is_seen_and_terminal():
    """gymnax's own step would show the next episode's first observation, and count a time limit as an end."""
    pytest.importorskip("gymnax")
    env = envs.make_jax("gymnax:CartPole-v1")
    state, shown = env.reset(jax.random.key(0))
    step = jax.jit(env.step)
    for _ in range(50):
        state, shown = step(state, jnp.array([0.0, 1.0]), jax.random.key(1))
        if shown.is_last:
            break
    assert shown.is_terminal and shown.reward == 1 and abs(shown.obs["state"][2]) > 12 * np.pi / 180
    late = state.replace(time=jnp.int32(499), theta=state.theta * 0, theta_dot=state.theta_dot * 0)
    _, shown = step(late, jnp.array([0.0, 1.0]), jax.random.key(1))
    assert shown.is_last and not shown.is_terminal


def test_a_discrete_observation_is_a_category():
    pytest.importorskip("gymnax")
    env = envs.make_jax("gymnax:FrozenLake-misc")
    assert env.spec.obs["state"].classes == 16 and env.spec.action.classes == 4
    assert env.reset(jax.random.key(0))[1].obs["state"].dtype == "int32"


@pytest.mark.parametrize(
    "name, package, part",
    [
        ("gymnax:CartPole", "gymnax", "gymnax has no task 'CartPole' for us, it must be one of: CartPole-v1"),
        ("gymnax:MNISTBandit-bsuite", "gymnax", "gymnax has no task 'MNISTBandit-bsuite' for us"),
        ("brax:ants", "brax", "brax has no task 'ants' for us, it must be one of: ant"),
        ("brax:ant:warp", "brax", "brax has no physics 'warp', it must be one of: generalized, mjx"),
        ("brax:ant:", "brax", "brax has no physics ''"),
        ("playground:Walker", "mujoco_playground", "playground has no task 'Walker'"),
    ],
)
def test_refusals(name, package, part):
    pytest.importorskip(package)
    assert envs.is_jax(name)
    with pytest.raises(ValueError) as caught:
        envs.make_jax(name)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_a_task_that_its_library_cannot_make_is_a_sentence(monkeypatch):
    """As Playground's reachers, which call a function that MuJoCo has no more."""

    def load(name, config_overrides):
        raise AttributeError("no 'find_body'")

    suite = SimpleNamespace(
        ALL_ENVS=("ReacherEasy",), get_default_config=lambda _: SimpleNamespace(episode_length=5), load=load
    )
    monkeypatch.setattr(brax_adapter, "optional", lambda *_: SimpleNamespace(dm_control_suite=suite))
    with pytest.raises(ValueError, match="cannot make 'ReacherEasy' with the MuJoCo that is installed: no"):
        envs.make_jax("playground:ReacherEasy")


def test_playground_as_it_is_declared():
    pytest.importorskip("mujoco_playground")
    env = envs.make_jax("playground:CartpoleBalance")
    assert env.spec.obs["state"].shape == (5,) and env.spec.action.shape == (1,)
    assert env.spec.max_steps == 1000 and env.costly_reset


@pytest.mark.slow
def test_playground_passes_the_checks():
    pytest.importorskip("mujoco_playground")
    assert envs.check(envs.make_jax("playground:CartpoleBalance"))


def test_numbers_that_are_not_finite_end_an_episode():
    """As truncated, even where the simulator also says terminal; the rest passes through."""
    yes, no = jnp.ones((), bool), jnp.zeros((), bool)
    for obs, reward in ((jnp.array([1.0, jnp.nan]), 1.0), (jnp.ones(2), jnp.inf)):
        ended = contain(TimeStep({"x": obs, "n": jnp.int32(3)}, jnp.float32(reward), no, yes))
        assert ended.is_last and not ended.is_terminal and ended.reward == 0
        assert ended.obs["x"].tolist() == [0, 0] and ended.obs["n"] == 0
    good = TimeStep({"x": jnp.ones(2)}, jnp.float32(2), yes, yes)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, contain(good), good))


def test_states_get_the_types_of_the_first_and_buffers_of_their_own():
    zero = jnp.zeros(())
    state = typed(
        {"a": zero, "b": zero, "n": 3}, jax.eval_shape(lambda: {"a": zero, "b": zero, "n": jnp.int32(0)})
    )
    assert state["n"].dtype == "int32" and not state["n"].weak_type
    assert state["a"].unsafe_buffer_pointer() != state["b"].unsafe_buffer_pointer()


def test_range_of_actions():
    low, high = np.array([-2.0, 0.0]), np.array([2.0, 1.0])
    assert in_range(jnp.array([0.5, -3.0]), low, high).tolist() == [1.0, 0.0]
