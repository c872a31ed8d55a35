"""Tasks of dm_control in MJX against dm_control itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl import envs
from mbrl.drivers import make_source
from mbrl.envs import dmc
from mbrl.errors import UserError

pytest.importorskip("mujoco.mjx", reason="needs the extra [mjx]")

from mbrl.envs import mjx
from tests.mjx_parity import REPEAT, STARTS, compare, device

LIGHT = "point_mass_easy"
"""The task whose program compiles fastest; the others are marked slow."""
ALL = [task if task == LIGHT else pytest.param(task, marks=pytest.mark.slow) for task in mjx.TASKS]


@pytest.mark.parametrize("task", ALL)
def test_observations_and_rewards_are_those_of_dm_control(task):
    """From equal states, along equal actions, up to the precision of float32. A contact changes velocities by
    jumps, and touch with them, so these may differ by more."""
    assert device(task)[0].spec == dmc.make(task, 0, REPEAT).spec
    difference = compare(task)
    assert difference.position < 1e-4 and difference.velocity < 1e-3 and difference.reward < 1e-3


@pytest.mark.parametrize("task", ALL)
def test_starts_are_drawn_as_in_dm_control(task):
    """Mean and standard deviation of every entry of the first observation, against 200 of the host. Of what is
    the same but for a few starts, as the touch of a hopper (on either side one start in some 600), the mean."""
    count = 200
    env, reset, _ = device(task)
    _, first = reset(jax.random.split(jax.random.key(1), count))
    host = dmc.make(task, 0)
    theirs = [host.reset().obs for _ in range(count)]
    for key in env.spec.obs:
        ours, other = np.asarray(first.obs[key]), np.stack([obs[key] for obs in theirs])
        spread = np.maximum(other.std(0), 1e-6)
        np.testing.assert_allclose(ours.mean(0), other.mean(0), atol=5 * (2 / count) ** 0.5 * spread.max())
        often = np.any([(x != np.median(x, 0)).mean(0) > 0.05 for x in (ours, other)], 0)
        ours, other = ours[:, often], other[:, often]
        np.testing.assert_allclose(ours.std(0), other.std(0), atol=0.35 * spread.max())


@pytest.mark.parametrize("task", ALL)
def test_episodes_end_by_truncation_after_the_frames_of_dm_control(task):
    env, reset, step = device(task)
    keys = jax.random.split(jax.random.key(0), STARTS)
    state, _ = reset(keys)
    state = state._replace(frame=jnp.array([996, 998] * (STARTS // 2)))
    _, shown = step(state, jnp.zeros((STARTS, env.spec.action.size)), keys)
    assert shown.is_last.tolist() == [False, True] * (STARTS // 2) and not shown.is_terminal.any()
    assert env.spec.max_steps == 500


def test_a_simulation_that_diverges_ends_its_episode():
    """As on the host: truncated, with zeros, whatever the others do."""
    env, reset, step = device(LIGHT)
    keys = jax.random.split(jax.random.key(0), STARTS)
    state, _ = reset(keys)
    state = state._replace(position=state.position.at[0].set(jnp.nan))
    _, shown = step(state, jnp.zeros((STARTS, env.spec.action.size)), keys)
    assert shown.is_last.tolist() == [True] + [False] * (STARTS - 1) and not shown.is_terminal.any()
    assert all((np.asarray(x[0]) == 0).all() and np.isfinite(x[1]).all() for x in shown.obs.values())
    assert shown.reward[0] == 0


def test_tasks_are_those_of_dm_control():
    assert set(mjx.TASKS) <= set(dmc.task_names())
    assert make_source("cup_catch", 1, backend="host").spec.name == "ball_in_cup_catch"


@pytest.mark.parametrize(
    "task, repeat, part",
    [
        ("humanoid_run", 2, "'humanoid_run' is not among the tasks that run on the device: acrobot_swingup"),
        ("pendulum", 2, "--env-backend host has all"),
        (LIGHT, 3, "action_repeat must divide the 1000 control steps"),
    ],
)
def test_refusals(task, repeat, part):
    with pytest.raises(UserError) as caught:
        make_source(task, repeat, backend="mjx")
    assert part in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="env_backend is 'gpu'"):
        make_source(task, repeat, backend="gpu")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["cartpole_swingup", "cheetah_run", "walker_walk"])
def test_check(task):
    assert envs.check(device(task)[0])


def test_no_pictures():
    with pytest.raises(UserError, match="--obs pixels needs --env-backend host"):
        make_source(LIGHT, 2, "pixels", backend="mjx")
