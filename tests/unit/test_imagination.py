"""The rollout alone, on a transparent world model: what goes in, in which order, what comes out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl.imagination import rollout
from mbrl.types import Starts, WorldModel

KEY = jax.random.key(0)


def counter_model() -> WorldModel:
    """State: {"x": [...]}, which every step multiplies by ctx and adds the first action to. imagine_init adds
    a remaining-horizon entry, as models with a suffix cache do."""
    unused = dict.fromkeys(WorldModel._fields, lambda *args: pytest.fail("not needed for a rollout"))
    return WorldModel(**unused)._replace(
        imagine_init=lambda params, starts, horizon: {**starts.states, "left": jnp.full((), horizon)},
        imagine_step=lambda params, ctx, state, action, key: {
            "x": params * ctx * state["x"] + action[..., 0],
            "left": state["left"] - 1,
        },
        features=lambda params, state: state["x"][..., None],
        emit=lambda state: state,
    )


def test_closed_loop():
    """States include the start; action t is chosen from state t and leads to state t + 1; ctx is passed on."""
    starts = Starts(jnp.float32(2.0), {"x": jnp.array([1.0, 10.0])})
    policy = lambda features, key, t: features + t
    states, actions = rollout(counter_model(), jnp.float32(1.0), starts, policy, KEY, 3)
    x, expected_x, expected_a = np.array([1.0, 10.0]), [np.array([1.0, 10.0])], []
    for t in range(3):
        expected_a.append(x + t)
        x = 2 * x + expected_a[-1]
        expected_x.append(x)
    np.testing.assert_allclose(states["x"], np.stack(expected_x))
    np.testing.assert_allclose(actions[..., 0], np.stack(expected_a))
    np.testing.assert_array_equal(states["left"], [3, 2, 1, 0])


def test_open_loop_and_leading_axes():
    """Given actions are used as they are, for any leading axes of the starts."""
    given = jax.random.normal(KEY, (4, 3, 2, 1))
    starts = Starts(jnp.float32(1.0), {"x": jnp.zeros((3, 2))})
    states, actions = rollout(counter_model(), 1.0, starts, lambda f, k, t: given[t], KEY, 4)
    np.testing.assert_array_equal(actions, given)
    np.testing.assert_allclose(states["x"][1:], np.cumsum(given[..., 0], 0), atol=1e-6)
    assert states["x"].shape == (5, 3, 2)


def test_keys_are_fresh_at_every_step():
    """No two steps share a key, and the policy's key is not the model's."""
    model = counter_model()

    def noisy_init(*args):
        return {**counter_model().imagine_init(*args), "noise": jnp.zeros(2)}

    def noisy_step(params, ctx, state, action, key):
        following = counter_model().imagine_step(params, ctx, state, action, key)
        return {**following, "noise": jax.random.normal(key, (2,))}

    model = model._replace(imagine_init=noisy_init, imagine_step=noisy_step)
    policy = lambda features, key, t: jax.random.normal(key, features.shape)
    starts = Starts(jnp.float32(1.0), {"x": jnp.zeros(2)})
    states, actions = rollout(model, 1.0, starts, policy, KEY, 5)
    used = np.concatenate([states["noise"][1:].ravel(), actions.ravel()])
    assert len(np.unique(used)) == len(used)
    again, _ = rollout(model, 1.0, starts, policy, KEY, 5)
    np.testing.assert_array_equal(states["noise"], again["noise"])


@pytest.mark.parametrize("horizon", [1, 5])
def test_gradient_through_the_dynamics(horizon):
    """The last state depends on the first action through every step in between."""
    starts = Starts(jnp.float32(3.0), {"x": jnp.zeros(())})

    def last(action):
        first_only = lambda features, key, t: jnp.where(t == 0, action, 0.0)[None]
        return rollout(counter_model(), 1.0, starts, first_only, KEY, horizon)[0]["x"][-1]

    assert jax.grad(last)(1.0) == pytest.approx(3.0 ** (horizon - 1))
