"""Linear recurrences and the S5 layer against float64 recurrences in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl.recurrence import linear_recurrence
from world_models.s4wm import S5, S4WMConfig, discretise, hippo_blocks

T, B, P, WIDTH = 40, 2, 8, 6
CONFIG = S4WMConfig(width=WIDTH, ssm_size=P, ssm_blocks=2, learned_reset=True)


def by_hand(a, b, is_first, initial, reset):
    """s_t = a s_{t-1} + b_t in complex128, one step at a time."""
    state, states = np.asarray(initial, np.complex128), []
    for first, drive in zip(np.asarray(is_first), np.asarray(b, np.complex128)):
        state = np.asarray(a, np.complex128) * np.where(first[:, None], reset, state) + drive
        states.append(state)
    return np.stack(states)


def random_complex(rng, *shape):
    return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64)


@pytest.mark.parametrize("impl", ["sequential", "associative", "auto"])
@pytest.mark.parametrize("begins", [False, True])
def test_resets_are_exact(impl, begins):
    """At random places, with a reset state that is not zero, and whether or not row 0 begins an episode."""
    rng = np.random.default_rng(0)
    a = np.exp(-rng.random(P) / 10 + 1j * rng.random(P)).astype(np.complex64)
    b, initial, reset = random_complex(rng, T, B, P), random_complex(rng, B, P), random_complex(rng, P)
    is_first = rng.random((T, B)) < 0.15
    is_first[0] = begins
    ours = jax.jit(linear_recurrence, static_argnums=5)(a, b, is_first, initial, reset, impl)
    np.testing.assert_allclose(ours, by_hand(a, b, is_first, initial, reset), rtol=1e-4, atol=1e-4)


def test_hippo():
    """The eigenpairs are those of the normal part of HiPPO-LegS, one of each conjugate pair per block."""
    values, vectors = hippo_blocks(P, 2)
    n = P
    root = np.sqrt(2 * np.arange(n) + 1)
    legs = -np.tril(np.outer(root, root), -1) - np.diag(np.arange(n) + 1.0)
    normal = legs + 0.5 * np.outer(root, root)
    assert values.shape == (P,) and vectors.shape == (2, n, P // 2)
    np.testing.assert_allclose(normal @ vectors[1], vectors[1] * values[P // 2 :], atol=1e-12)
    both = np.concatenate([values[: P // 2], values[: P // 2].conj()])
    np.testing.assert_allclose(np.sort(both.imag), np.sort(np.linalg.eigvals(normal).imag), atol=1e-10)
    assert (values.imag > 0).all() and np.allclose(values.real, -0.5)


@pytest.mark.parametrize("rule", ["zoh", "bilinear", "unit"])
@pytest.mark.parametrize("dt", [1e-4, 1e-3, 0.1])
def test_discretise(rule, dt):
    """Relative error of float32 rounding only, also where the step is small; stable for any step."""
    rate = hippo_blocks(P, 2)[0]
    if rule == "zoh":
        decay, gain = np.exp(rate * dt), (np.exp(rate * dt) - 1) / rate
    elif rule == "unit":  # white noise of variance 1 gives a state of variance sum_k |A^k g|^2 = 1
        decay = np.exp(rate * dt)
        gain = (np.abs(decay) ** (2 * np.arange(200_000)[:, None])).sum(0) ** -0.5
    else:
        decay, gain = (1 + dt * rate / 2) / (1 - dt * rate / 2), dt / (1 - dt * rate / 2)
    ours = discretise(jnp.asarray(rate, jnp.complex64), jnp.full(P, dt, jnp.float32), rule)
    np.testing.assert_allclose(ours[0], decay, rtol=1e-6)
    np.testing.assert_allclose(ours[1], gain, rtol=1e-6)
    assert (np.abs(ours[0]) < 1).all()


def test_layer_against_numpy():
    """The whole layer, y = 2 Re(C s) + D u, equals the real system of twice the size, of which
    the complex one keeps one of each conjugate pair."""
    layer, rng = S5(CONFIG), np.random.default_rng(1)
    u = jnp.asarray(rng.normal(size=(T, B, WIDTH)), jnp.float32)
    params = layer.init(jax.random.key(0), u, method="drive")
    params = jax.tree.map(lambda x: x + 0.1, params)  # a reset state that is not zero

    def run(params, u):
        decay, drive, reset = layer.apply(params, u, method="drive")
        first = jnp.zeros((T, B), bool).at[0].set(True)
        states = linear_recurrence(decay, drive, first, jnp.zeros((B, P), jnp.complex64), reset)
        return layer.apply(params, states, u, method="read")

    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"])
    rate = -np.exp(p["rate_log"]) + 1j * p["rate_imag"]
    decay = np.exp(rate * np.exp(p["step_log"]))
    inputs = ((decay - 1) / rate)[:, None] * (p["B"][0] + 1j * p["B"][1])
    # Both of each conjugate pair.
    decay, inputs = np.concatenate([decay, decay.conj()]), np.concatenate([inputs, inputs.conj()])
    outputs = p["C"][0] + 1j * p["C"][1]
    outputs = np.concatenate([outputs, outputs.conj()], 1)
    reset = p["reset"][0] + 1j * p["reset"][1]
    state = np.broadcast_to(np.concatenate([reset, reset.conj()]), (B, 2 * P))
    for t, ours in enumerate(np.asarray(jax.jit(run)(params, u))):
        state = decay * state + np.asarray(u[t]) @ inputs.T
        y = state @ outputs.T
        np.testing.assert_allclose(y.imag, 0, atol=1e-10)
        np.testing.assert_allclose(ours, y.real + p["D"] * np.asarray(u[t]), rtol=1e-4, atol=1e-4)
