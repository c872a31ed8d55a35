"""The JAX pendulum against dm_control's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl.envs import dmc, pendulum

SEEDS = range(8)


def compare(dtype) -> tuple[float, float, int]:
    """Largest difference in the observations after one step from equal states, and after up to 100 steps
    from equal starts, over eight episodes of random actions; and the number of rewards that differ."""
    theirs = dmc._suite().load("pendulum", "swingup", task_kwargs={"random": 0})
    env = pendulum.make(action_repeat=1)
    step, key, one, free, wrong = jax.jit(env.step), jax.random.key(0), 0.0, 0.0, 0

    def state_of(physics) -> pendulum.State:
        angle = (physics.data.qpos[0] + np.pi) % (2 * np.pi) - np.pi
        return pendulum.State(
            jnp.asarray(angle, dtype), jnp.asarray(physics.data.qvel[0], dtype), jnp.int32(0)
        )

    for seed in SEEDS:
        theirs.reset()
        state = state_of(theirs.physics)
        for action in np.random.default_rng(seed).uniform(-1, 1, (100, 1)):
            _, near = step(state_of(theirs.physics), jnp.asarray(action, dtype), key)
            state, far = step(state, jnp.asarray(action, dtype), key)
            shown = theirs.step(action)
            for name, value in shown.observation.items():
                one = max(one, np.abs(near.obs[name] - value).max())
                free = max(free, np.abs(far.obs[name] - value).max())
            wrong += int(far.reward != shown.reward)
    return float(one), float(free), wrong


def test_parity_with_dm_control():
    one, free, wrong = compare(np.float32)
    print(f"float32: one step {one:.1e}, 100 steps {free:.1e}, rewards that differ {wrong}")
    assert one < 3e-6 and free < 1e-4 and wrong == 0


def test_parity_with_dm_control_in_double_precision():
    with jax.enable_x64(True):
        one, free, wrong = compare(np.float64)
    print(f"float64: one step {one:.1e}, 100 steps {free:.1e}, rewards that differ {wrong}")
    assert one < 1e-13 and free < 1e-11 and wrong == 0


def test_spec_is_that_of_dm_control():
    ours, theirs = pendulum.make().spec, dmc.make("pendulum_swingup", 0).spec
    assert (ours.obs, ours.action, ours.action_repeat, ours.max_steps) == (
        theirs.obs,
        theirs.action,
        theirs.action_repeat,
        theirs.max_steps,
    )


def test_starts_at_rest_uniform_over_the_circle():
    states, first = jax.vmap(pendulum.make().reset)(jax.random.split(jax.random.key(0), 4000))
    assert not states.velocity.any() and not first.obs["velocity"].any()
    counts, _ = np.histogram(states.angle, bins=8, range=(-np.pi, np.pi))
    assert counts.sum() == 4000 and abs(counts - 500).max() < 100


@pytest.mark.parametrize("dense", [False, True])
def test_action_repeat_sums_the_frames(dense):
    single, double = (pendulum.make(action_repeat=n, dense=dense) for n in (1, 3))
    action, key = jnp.array([0.7]), jax.random.key(1)
    start = pendulum.State(jnp.float32(0.12), jnp.float32(0.1), jnp.int32(0))
    state, total = start, 0.0
    for _ in range(3):
        state, timestep = single.step(state, action, key)
        total += float(timestep.reward)
    jumped, timestep = double.step(start, action, key)
    assert float(timestep.reward) == pytest.approx(total, abs=1e-6) and total > 0
    assert float(jumped.angle) == pytest.approx(float(state.angle), abs=1e-6)


def test_rewards():
    still, key = jnp.zeros(1), jax.random.key(0)

    def reward(degrees, dense):
        state = pendulum.State(jnp.deg2rad(jnp.float32(degrees)), jnp.float32(0), jnp.int32(0))
        return float(pendulum.make(action_repeat=1, dense=dense).step(state, still, key)[1].reward)

    assert [reward(angle, False) for angle in (0, 7, -7, 9, 180)] == [1, 1, 1, 0, 0]
    dense = [reward(angle, True) for angle in (0, 60, 120, 179)]
    assert dense == sorted(dense, reverse=True) and dense[0] == 1 and dense[-1] < 1e-3


def test_the_motor_cannot_lift_the_pole_in_one_go():
    env = pendulum.make(max_steps=500)
    state = pendulum.State(jnp.float32(-3.14), jnp.float32(0), jnp.int32(0))

    def step(state, _):
        state, timestep = env.step(state, jnp.ones(1), jax.random.key(0))
        return state, (timestep.reward, timestep.obs["orientation"][0])

    _, (rewards, cosines) = jax.lax.scan(step, state, length=400)
    assert rewards.sum() == 0 and cosines.max() < 0


@pytest.mark.parametrize("wrong", [{"max_steps": 0}, {"action_repeat": 0}])
def test_impossible_arguments(wrong):
    with pytest.raises(ValueError, match="at least 1, found 0"):
        pendulum.make(**wrong)
