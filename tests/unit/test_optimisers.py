"""Schedules, clipping, groups and LaProp against plain numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mbrl import optimisers
from mbrl.optimisers import OptimiserConfig

PARAMS = {
    "model": {"core": {"kernel": jnp.array([[3.0, -4.0]]), "bias": jnp.array([0.5, 1.0])}},
    "actor": {"out": {"kernel": jnp.array([[1.0], [2.0]]), "bias": jnp.zeros(1)}},
}
# Constant learning rate without warm-up or clipping, so that one update is -lr * sign(gradient).
PLAIN = {"learning_rate": 0.1, "warmup": 0, "agc": 0.0}


def one_update(config: OptimiserConfig, grads, groups=None, total=100):
    optimiser = optimisers.make(config, total, groups)
    return optimiser.update(grads, optimiser.init(PARAMS), PARAMS)[0]


def ones(params):
    return jax.tree.map(jnp.ones_like, params)


# Schedules -------------------------------------------------------------------------------------------------


def rates(total=100, **fields):
    schedule = optimisers.learning_rate(OptimiserConfig(learning_rate=2.0, **fields), total)
    return np.array([schedule(k) for k in range(total + 50)])


def test_warmup_then_constant():
    """0 at the first update, linear, full after ``warmup`` updates and for ever."""
    r = rates(warmup=10)
    np.testing.assert_allclose(r[:11], 2.0 * np.arange(11) / 10, rtol=1e-6)
    np.testing.assert_allclose(r[10:], 2.0, rtol=1e-6)


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_decay(decay):
    """From full at the end of warm-up down to ``final_fraction`` at the last update, never below."""
    r = rates(warmup=10, decay=decay, final_fraction=0.1)
    assert r[10] == pytest.approx(2.0) and r.max() == pytest.approx(2.0)
    np.testing.assert_allclose(r[100:], 0.2, rtol=1e-5)
    assert (np.diff(r[10:101]) < 0).all()
    assert r[55] == pytest.approx(1.1)  # both shapes are half-way in the middle
    quarter = {"linear": 0.2 + 1.8 * (1 - 9 / 90), "cosine": 0.2 + 0.9 * (1 + np.cos(np.pi * 9 / 90))}
    assert r[19] == pytest.approx(quarter[decay], rel=1e-5)


def test_decay_start():
    r = rates(warmup=10, decay="linear", decay_start=0.5, final_fraction=0.0)
    np.testing.assert_allclose(r[10:51], 2.0, rtol=1e-6)
    assert r[75] == pytest.approx(1.0) and r[100] == 0.0


@pytest.mark.parametrize("fields", [{"warmup": 0}, {"warmup": 1000}, {"warmup": 0, "decay": "linear"}])
def test_schedule_of_a_short_run(fields):
    """No division by zero without warm-up, and none where the run is shorter than it."""
    r = rates(total=20, **fields)
    assert np.isfinite(r).all() and (r <= 2.0).all() and (r[1:] > 0).all()
    assert r[0] == (2.0 if fields["warmup"] == 0 else 0.0)


def test_the_optimiser_follows_the_schedule():
    """The k-th update has the learning rate of count k."""
    config = OptimiserConfig(learning_rate=1.0, warmup=4, agc=0.0)
    optimiser = optimisers.make(config, 100)
    state = optimiser.init(PARAMS)
    for k in range(6):
        updates, state = optimiser.update(ones(PARAMS), state, PARAMS)
        np.testing.assert_allclose(updates["actor"]["out"]["bias"], -min(1.0, k / 4), atol=1e-5)


# Clipping --------------------------------------------------------------------------------------------------


def clip(g, w, limit=0.3):
    return optimisers.adaptive_clip(limit).update({"x": g}, optax.EmptyState(), {"x": w})[0]["x"]


def test_adaptive_clip_is_per_tensor():
    """Rows of very different norms are scaled by one factor (optax's own clips them unit by unit)."""
    w = jnp.array([[3.0, 0.0], [0.0, 4.0]])
    g = jnp.array([[100.0, 0.0], [0.0, 1e-3]])
    clipped = clip(g, w)
    assert np.linalg.norm(clipped) == pytest.approx(0.3 * 5)
    np.testing.assert_allclose(clipped, g * 1.5 / 100, rtol=1e-4)


def test_adaptive_clip_leaves_small_gradients_alone():
    g = jnp.array([[0.5, -0.2]])
    np.testing.assert_array_equal(clip(g, jnp.array([[3.0, 4.0]])), g)


def test_adaptive_clip_of_a_zero_tensor():
    """A head that starts at zero may move: its norm counts as 1e-3."""
    clipped = clip(jnp.array([3.0, 4.0]), jnp.zeros(2))
    assert np.linalg.norm(clipped) == pytest.approx(0.3 * 1e-3)
    assert (clip(jnp.zeros(2), jnp.zeros(2)) == 0).all()


def test_clip_norm_is_global():
    """clip_norm bounds the norm over all tensors; seen through Adam's first moments."""
    config = OptimiserConfig(name="adam", clip_norm=1.0, agc=0.0, warmup=0)
    optimiser = optimisers.make(config, 100)
    grads = jax.tree.map(lambda x: jnp.full_like(x, 50.0), PARAMS)
    _, state = optimiser.update(grads, optimiser.init(PARAMS), PARAMS)
    moments = next(s.mu for s in state if hasattr(s, "mu"))
    assert optax.global_norm(moments) == pytest.approx(0.1, rel=1e-4)  # 1 - beta1


# Update rules ----------------------------------------------------------------------------------------------


def test_laprop_against_numpy():
    """RMS first, then momentum, both bias-corrected; gradients whose scale jumps tell it from Adam."""
    beta1, beta2, rate = 0.8, 0.95, 0.1
    rng = np.random.default_rng(0)
    grads = [rng.normal(size=2) * 10.0**i for i in (0, 2, -1, 1, 0)]
    optimiser = optimisers.make(OptimiserConfig(**PLAIN, beta1=beta1, beta2=beta2), 100)
    params = {"bias": jnp.array([1.0, -1.0])}
    state = optimiser.init(params)
    second, first = np.zeros(2), np.zeros(2)
    for i, g in enumerate(grads, 1):
        updates, state = optimiser.update({"bias": jnp.asarray(g, jnp.float32)}, state, params)
        second = beta2 * second + (1 - beta2) * g**2
        first = beta1 * first + (1 - beta1) * g / np.sqrt(second / (1 - beta2**i))
        np.testing.assert_allclose(updates["bias"], -rate * first / (1 - beta1**i), rtol=1e-4)


def test_adam_is_optax_adam():
    config = OptimiserConfig(name="adam", **PLAIN, eps=1e-8)
    ours, reference = optimisers.make(config, 100), optax.adam(0.1, 0.9, 0.999, 1e-8)
    states = ours.init(PARAMS), reference.init(PARAMS)
    for i in range(3):
        grads = jax.tree.map(lambda x, i=i: jnp.sin(x + i), PARAMS)
        a, b = ours.update(grads, states[0], PARAMS), reference.update(grads, states[1], PARAMS)
        states = a[1], b[1]
        for x, y in zip(jax.tree.leaves(a[0]), jax.tree.leaves(b[0])):
            np.testing.assert_allclose(x, y, rtol=1e-6)


@pytest.mark.parametrize("name", ["laprop", "adam"])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-8, 1e4, 1e18])
def test_updates_are_finite(name, size):
    """Zero, denormal and huge gradients give finite updates; a zero gradient gives exactly none."""
    config = OptimiserConfig(name=name, learning_rate=1.0, warmup=0)
    updates = jax.tree.leaves(one_update(config, jax.tree.map(lambda x: jnp.full_like(x, size), PARAMS)))
    assert all(np.isfinite(x).all() for x in updates)
    assert size or all((x == 0).all() for x in updates)


# Groups ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["laprop", "adam"])
def test_lr_scale(name):
    """A group's learning rate is scaled, others are not; 0 freezes it exactly."""
    groups = {r"^model/.*bias$": {"lr_scale": 0.0}, "^model/": {"lr_scale": 0.5}}
    updates = one_update(OptimiserConfig(name=name, **PLAIN), ones(PARAMS), groups)
    assert (updates["model"]["core"]["bias"] == 0).all()  # the first match wins
    np.testing.assert_allclose(updates["model"]["core"]["kernel"], -0.05, rtol=1e-5)
    np.testing.assert_allclose(updates["actor"]["out"]["kernel"], -0.1, rtol=1e-5)


def test_weight_decay():
    """Decoupled: -lr * decay * w on kernels only, and per group also elsewhere or not at all."""
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates = one_update(OptimiserConfig(**PLAIN, weight_decay=0.01), zeros)
    np.testing.assert_allclose(updates["model"]["core"]["kernel"], -1e-3 * PARAMS["model"]["core"]["kernel"])
    assert (updates["model"]["core"]["bias"] == 0).all()
    groups = {"^actor/": {"weight_decay": 0.0}, "core/bias": {"weight_decay": 1.0, "lr_scale": 2.0}}
    updates = one_update(OptimiserConfig(**PLAIN, weight_decay=0.01), zeros, groups)
    assert (updates["actor"]["out"]["kernel"] == 0).all()
    np.testing.assert_allclose(updates["model"]["core"]["bias"], -0.2 * PARAMS["model"]["core"]["bias"])
    np.testing.assert_allclose(updates["model"]["core"]["kernel"], -1e-3 * PARAMS["model"]["core"]["kernel"])


def test_state_shares_no_buffers():
    """Leaves of a donated state must be separate arrays."""
    for name in ("laprop", "adam"):
        state = optimisers.make(OptimiserConfig(name=name), 10).init(PARAMS)
        pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
        assert len(set(pointers)) == len(pointers)
