"""Layers: initial scales, normalisation, block structure, and how observations become one vector."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbrl.networks import MLP, BlockLinear, Dense, Linear, RMSNorm, flatten_obs, product, symexp, symlog
from mbrl.types import ArraySpec

KEY = jax.random.key(0)


@settings(max_examples=50, deadline=None)
@given(st.floats(-(2.0**100), 2.0**100, width=32))
def test_symlog_and_symexp_are_inverse(x):
    """Also far from 0, where symexp(symlog(x)) loses digits only as fast as the exponential amplifies them."""
    compressed = float(symlog(jnp.float32(x)))
    assert abs(compressed) <= abs(x) * (1 + 1e-6) and compressed * x >= 0
    np.testing.assert_allclose(
        symexp(jnp.float32(compressed)), x, rtol=1e-6 * (1 + abs(compressed)), atol=1e-37
    )
    np.testing.assert_allclose(compressed, np.sign(x) * np.log1p(abs(x)), rtol=1e-6, atol=1e-37)


def test_symlog_gradient_is_one_at_zero():
    """sign(x) has gradient 0 at 0; the product must not kill the gradient near 0."""
    np.testing.assert_allclose(jax.vmap(jax.grad(symlog))(jnp.array([-1e-3, 1e-3])), 1.0, atol=2e-3)


@pytest.mark.parametrize("outscale", [1.0, 0.01])
def test_linear_init(outscale):
    """Variance outscale^2 / fan_in after truncation at 2 standard deviations, bias 0."""
    params = Linear(300, outscale).init(KEY, jnp.zeros((1, 200)))["params"]
    kernel = np.asarray(params["kernel"])
    expected = outscale / np.sqrt(200)
    assert kernel.std() == pytest.approx(expected, rel=0.01)
    assert np.abs(kernel).max() <= 2 * expected / 0.8796 * 1.0001  # 60,000 normals would reach 4 deviations
    assert np.abs(kernel).max() > 2 * expected / 0.8796 * 0.99
    assert (np.asarray(params["bias"]) == 0).all()


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (3, 3)])
def test_product_has_the_gradients_of_a_product(shape):
    """Of both factors, whichever axis of the kernel is the narrower, with any batch axes and under vmap."""
    keys = jax.random.split(KEY, 3)
    x, kernel = jax.random.normal(keys[0], (5, 4, 7, shape[0])), jax.random.normal(keys[1], (5, *shape))
    weight = jax.random.normal(keys[2], (5, 4, 7, shape[1]))

    def gradients(multiply):
        loss = lambda x, kernel, weight: (weight * multiply(x, kernel)).sum()
        return jax.vmap(jax.grad(loss, (0, 1)))(x, kernel, weight)

    for found, expected in zip(gradients(product), gradients(jnp.matmul), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_zero_outscale_is_zero():
    params = Linear(7, 0.0).init(KEY, jnp.zeros((1, 5)))["params"]
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(params))


def test_block_linear_init_counts_the_full_width():
    """1 / sqrt(1024), not 1 / sqrt(128): a per-block fan-in would be 2.8 times larger and would not match."""
    params = BlockLinear(512, 8).init(KEY, jnp.zeros((1, 1024)))["params"]
    assert params["kernel"].shape == (8, 128, 64)
    assert params["bias"].shape == (512,)
    assert np.asarray(params["kernel"]).std() == pytest.approx(1 / np.sqrt(1024), rel=0.01)


@pytest.mark.parametrize("blocks", [1, 4])
def test_block_linear_is_block_diagonal(blocks):
    """Equal to a dense layer whose kernel has the blocks on its diagonal, on contiguous features."""
    layer, x = BlockLinear(12, blocks), jax.random.normal(KEY, (3, 2, 8))
    params = layer.init(KEY, x)["params"]
    params = {**params, "bias": jax.random.normal(jax.random.key(1), (12,))}
    dense = jax.scipy.linalg.block_diag(*params["kernel"])
    np.testing.assert_allclose(layer.apply({"params": params}, x), x @ dense + params["bias"], atol=1e-5)


def test_block_linear_cuts_every_block():
    """The parts are those of each block, joined over the blocks; features that are shared enter all of them."""
    layer, x, shared = BlockLinear(24, 4), jax.random.normal(KEY, (3, 2, 8)), jnp.ones((3, 2, 5))
    params = layer.init(KEY, x, shared)["params"]
    params = {**params, "bias": jax.random.normal(jax.random.key(1), (24,))}
    whole = layer.apply({"params": params}, x, shared).reshape(3, 2, 4, 3, 2)
    parts = layer.apply({"params": params}, x, shared, 3, method="cut")
    for i, part in enumerate(parts):
        np.testing.assert_allclose(part, whole[..., i, :].reshape(3, 2, 8), atol=1e-5)


def test_rms_norm():
    """x / sqrt(mean(x^2) + 1e-4) over the whole axis, without centring; small inputs are not blown up."""
    x = jax.random.normal(KEY, (5, 16)) * jnp.array([1e-4, 1e-2, 1.0, 1e4, 0.0])[:, None] + 0.0
    scale = jnp.linspace(0.5, 2, 16)
    y = RMSNorm().apply({"params": {"scale": scale}}, x)
    expected = np.asarray(x, np.float64)
    expected = expected / np.sqrt((expected**2).mean(-1, keepdims=True) + 1e-4) * np.asarray(scale)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-7)
    params = RMSNorm().init(KEY, x)["params"]
    assert (params["scale"] == 1).all() and list(params) == ["scale"]


def test_rms_norm_computes_in_float32():
    """Squares of bfloat16 inputs of 300 would lose all but two digits; the result keeps the input's dtype."""
    x = (jax.random.normal(KEY, (4, 512)) * 300).astype(jnp.bfloat16)
    y = RMSNorm().apply({"params": {"scale": jnp.ones(512)}}, x)
    assert y.dtype == jnp.bfloat16
    exact = x.astype(jnp.float32) / np.sqrt((np.asarray(x, np.float64) ** 2).mean(-1, keepdims=True))
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-8)


def test_dense_order_and_dtype():
    """Linear with bias, then norm, then silu; float32 parameters, activations in the input's dtype."""
    x = jax.random.normal(KEY, (4, 6))
    params = Dense(8).init(KEY, x)["params"]
    params["linear"]["bias"] = jnp.arange(8.0)
    h = x @ params["linear"]["kernel"] + params["linear"]["bias"]
    h = h / jnp.sqrt((h**2).mean(-1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(Dense(8).apply({"params": params}, x), h * jax.nn.sigmoid(h), atol=1e-5)
    assert Dense(8).apply({"params": params}, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(Dense(8).init(KEY, x.astype(jnp.bfloat16))))


def test_mlp_layers():
    """``layers`` hidden layers and an output only where one is asked for."""
    assert set(MLP(2, 8).init(KEY, jnp.zeros((1, 3)))["params"]) == {"dense0", "dense1"}
    assert set(MLP(1, 8, 5).init(KEY, jnp.zeros((1, 3)))["params"]) == {"dense0", "out"}
    assert MLP(1, 8, 5).init_with_output(KEY, jnp.zeros((2, 7, 3)))[0].shape == (2, 7, 5)


def test_flatten_obs():
    """Sorted by key whatever the order of the dict; symlog of numbers, one-hot of categories; any batch axes."""
    spec = {
        "z_height": ArraySpec(()),
        "a_matrix": ArraySpec((2, 2)),
        "kind": ArraySpec((), "int32", 3),
        "parts": ArraySpec((2,), "int32", 2),
    }
    obs = {
        "parts": jnp.array([[[1, 0]]]),
        "z_height": jnp.array([[-1.0]]),
        "kind": jnp.array([[2]]),
        "a_matrix": jnp.array([[[[0.0, 1.0], [2.0, 3.0]]]]),
    }
    expected = [*np.log1p([0, 1, 2, 3]), 0, 0, 1, 0, 1, 1, 0, -np.log(2)]
    flat = flatten_obs(obs, spec)
    assert flat.shape == (1, 1, 12)
    np.testing.assert_allclose(flat[0, 0], expected, rtol=1e-6)
    assert flatten_obs(obs, spec, jnp.bfloat16).dtype == jnp.bfloat16
    unbatched = flatten_obs(jax.tree.map(lambda x: x[0, 0], obs), spec)
    np.testing.assert_allclose(unbatched, expected, rtol=1e-6)
