"""The Koopman dynamics against a plain loop in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl.errors import UserError
from mbrl.types import ArraySpec, EnvSpec
from world_models import koopman
from world_models.koopman import Koopman, KoopmanConfig

T, B, P, A = 12, 2, 6, 2
CONFIG = KoopmanConfig(
    stoch=2, classes=3, units=5, hidden=7, width=4, modes=P, memory_max=50.0, phase_max=1.0
)


def silu(x):
    return x / (1 + np.exp(-x))


def norm(x, scale):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-4) * scale


@pytest.fixture(scope="module")
def params():
    module = Koopman(CONFIG)
    zeros = jnp.zeros((1, 2, P)), jnp.zeros((1, 2, 3)), jnp.zeros((1, A)), jnp.zeros((1, CONFIG.units))
    params = module.init(jax.random.key(0), *zeros, method="everything")["params"]
    return jax.tree.map(lambda x: x + 0.1, params)  # biases that are not zero


def test_dynamics_against_numpy(params):
    """s_t = lambda s_{t-1} + sqrt(1 - |lambda|^2) B u_t and h_t = norm(C s_t), with episode starts inside, from a
    state that is not zero, by the sequence in one call and by its steps."""
    rng = np.random.default_rng(0)
    modes, stoch = rng.normal(size=(B, 2, P)), rng.normal(size=(T, B, 2, 3))
    action, is_first = 3 * rng.normal(size=(T, B, A)), np.zeros((T, B), bool)
    is_first[4, 0] = is_first[7, 1] = True
    inputs = [jnp.asarray(x, jnp.float32) for x in (modes, stoch, action)]
    run = jax.jit(
        lambda method, *args: Koopman(CONFIG).apply({"params": params}, *args, method=method),
        static_argnums=0,
    )
    ours_h, ours_modes = run("sequence", *inputs, jnp.asarray(is_first))

    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    linear = lambda layer, x: x @ layer["kernel"] + layer["bias"]
    dense = lambda layer, x: silu(norm(linear(layer["linear"], x), layer["norm"]["scale"]))
    decay = np.exp(-np.exp(p["rate_log"]) + 1j * p["phase"])
    state = modes[:, 0] + 1j * modes[:, 1]
    for t in range(T):
        bounded = action[t] / np.maximum(1, np.abs(action[t]))
        x = np.concatenate([stoch[t].reshape(B, -1), bounded], -1)
        u = linear(p["lift"], linear(p["latent"]["in_out"], dense(p["latent"]["in_hidden"], x)))
        before = np.where(is_first[t][:, None], 0, state)
        state = decay * before + np.sqrt(1 - np.abs(decay) ** 2) * (u[:, :P] + 1j * u[:, P:])
        planes = np.stack([state.real, state.imag], 1)
        h = norm(linear(p["read"], planes.reshape(B, -1)), p["norm"]["scale"])
        np.testing.assert_allclose(ours_modes[t], planes, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(ours_h[t], h, rtol=1e-4, atol=1e-4)
        given = jnp.asarray(np.stack([before.real, before.imag], 1), jnp.float32)
        step_h, step_modes = run("step", given, inputs[1][t], inputs[2][t])
        np.testing.assert_allclose(step_modes, planes, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(step_h, h, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rate_log", [-60.0, -20.0, 0.0, 5.0])
def test_spectrum_stays_in_the_unit_disc(params, rate_log):
    """Whatever is learned: modulus at most 1, input gain in [0, 1], and finite gradients of both."""

    def spectrum(rate_log, phase):
        moved = params | {"rate_log": rate_log, "phase": phase}
        decay, gain = Koopman(CONFIG).apply({"params": moved}, method="spectrum")
        return (decay.real + decay.imag + gain).sum(), (decay, gain)

    values = jnp.full(P, rate_log), jnp.linspace(-9.0, 9.0, P)
    grads, (decay, gain) = jax.grad(spectrum, argnums=(0, 1), has_aux=True)(*values)
    assert (np.abs(decay) <= 1 + 1e-6).all() and ((gain >= 0) & (gain <= 1)).all()
    assert all(np.isfinite(g).all() for g in grads)


def test_initial_spectrum():
    """Memories between memory_min and memory_max steps, phases between 0 and phase_max, spread over both."""
    config = KoopmanConfig(
        modes=2000, memory_min=2.0, memory_max=200.0, phase_max=0.5, width=2, hidden=2, units=2
    )
    zeros = jnp.zeros((1, 2, 2000)), jnp.zeros((1, 32, 64)), jnp.zeros((1, A)), jnp.zeros((1, 2))
    params = Koopman(config).init(jax.random.key(0), *zeros, method="everything")["params"]
    memory = np.exp(-np.asarray(params["rate_log"], np.float64))
    assert 2.0 * 0.999 < memory.min() < 2.1 and 190 < memory.max() < 200.0 * 1.001
    assert 18 < np.median(memory) < 22  # 20 is the middle on a log scale
    assert 0 <= params["phase"].min() < 0.01 and 0.49 < params["phase"].max() <= 0.5


@pytest.mark.parametrize(
    "fields", [{"modes": 0}, {"memory_min": 0.0}, {"memory_min": 9.0, "memory_max": 8.0}, {"phase_max": 4.0}]
)
def test_impossible_sizes(fields):
    with pytest.raises(UserError, match=r"model\.\w+ is "):
        koopman.make(KoopmanConfig(**fields), EnvSpec("task", {"x": ArraySpec((3,))}, ArraySpec((A,))))
