"""The JAX cartpole against dm_control's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl.envs import cartpole, dmc


def compare(dtype) -> dict[str, float]:
    """Largest difference of observations and rewards after one step from equal states, and after up to 100
    steps from equal starts ("free"), over episodes of random actions; some of them push into the end of the rail."""
    theirs = dmc._suite().load("cartpole", "swingup", task_kwargs={"random": 0})
    env = cartpole.make(action_repeat=1)
    step, key = jax.jit(env.step), jax.random.key(0)
    found = {"one": 0.0, "inside": 0.0, "reward": 0.0, "free": 0.0, "outside": 0}

    def state_of(physics) -> cartpole.State:
        position, velocity = physics.data.qpos.copy(), physics.data.qvel.copy()
        position[1] = (position[1] + np.pi) % (2 * np.pi) - np.pi
        return cartpole.State(jnp.asarray(position, dtype), jnp.asarray(velocity, dtype), jnp.int32(0))

    for seed in range(6):
        theirs.reset()
        rng = np.random.default_rng(seed)
        with theirs.physics.reset_context():
            theirs.physics.data.qpos[:] = rng.uniform([-1.8, -np.pi], [1.8, np.pi])
            theirs.physics.data.qvel[:] = rng.normal(0, [1, 5])
        state = state_of(theirs.physics)
        for action in np.clip(rng.uniform(-1, 1, (100, 1)) + rng.uniform(-1, 1), -1, 1):
            _, near = step(state_of(theirs.physics), jnp.asarray(action, dtype), key)
            state, far = step(state, jnp.asarray(action, dtype), key)
            inside = abs(theirs.physics.data.qpos[0]) < cartpole.RAIL - 0.1
            shown = theirs.step(action)
            for name, value in shown.observation.items():
                if inside:
                    found["inside"] = max(found["inside"], float(np.abs(near.obs[name] - value).max()))
                found["one"] = max(found["one"], float(np.abs(near.obs[name] - value).max()))
                found["free"] = max(found["free"], float(np.abs(far.obs[name] - value).max()))
            found["reward"] = max(found["reward"], float(abs(near.reward - shown.reward)))
            found["outside"] += int(abs(theirs.physics.data.qpos[0]) > cartpole.RAIL)
    return found


def test_parity_with_dm_control():
    found = compare(np.float32)
    print("float32:", found)
    assert found["one"] < 1e-5 and found["reward"] < 2e-6 and found["outside"] > 20


def test_parity_with_dm_control_in_double_precision():
    with jax.enable_x64(True):
        found = compare(np.float64)
    print("float64:", found)
    # MuJoCo finds the force of the rail's end by iteration.
    assert found["inside"] < 1e-12 and found["one"] < 1e-6 and found["reward"] < 1e-8 and found["free"] < 1e-5


def test_spec_is_that_of_dm_control():
    ours, theirs = cartpole.make().spec, dmc.make("cartpole_swingup", 0).spec
    fields = "obs", "action", "action_repeat", "max_steps"
    assert [getattr(ours, f) for f in fields] == [getattr(theirs, f) for f in fields]


def test_starts_hanging_with_noise():
    states, _ = jax.vmap(cartpole.make().reset)(jax.random.split(jax.random.key(0), 2000))
    angle = np.abs(np.asarray(states.position[:, 1], np.float64)) - np.pi  # either side of the bottom
    spread = [np.asarray(states.position[:, 0]), np.asarray(states.velocity), angle]
    for x in spread:
        assert np.sqrt(np.mean(np.square(x))) == pytest.approx(0.01, rel=0.1)


def test_action_repeat_sums_the_frames():
    single, triple = (cartpole.make(action_repeat=n) for n in (1, 3))
    action, key = jnp.array([0.7]), jax.random.key(1)
    start, timestep = single.reset(key)
    state, total = start, 0.0
    for _ in range(3):
        state, timestep = single.step(state, action, key)
        total += float(timestep.reward)
    jumped, timestep = triple.step(start, action, key)
    assert float(timestep.reward) == pytest.approx(total, rel=1e-5) and total > 0
    np.testing.assert_allclose(jumped.position, state.position, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"max_steps": 0}, {"action_repeat": 0}])
def test_impossible_arguments(wrong):
    with pytest.raises(ValueError, match="at least 1, found 0"):
        cartpole.make(**wrong)
