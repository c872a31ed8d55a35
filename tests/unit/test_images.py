"""Image encoders, decoders, shifts and losses against NumPy loops written from the papers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl import images
from mbrl.distributions import ImageMSE
from mbrl.errors import UserError
from mbrl.images import Conv, FlatDecoder, FlatEncoder, ImageDecoder, ImageEncoder, StridedConvs, UpConv
from mbrl.types import ArraySpec

RNG = np.random.default_rng(0)


def convolve(x, kernel, bias, stride=1, pad=None):
    """[N, h, w, i] with zeros around, one window at a time."""
    kernel = np.asarray(kernel)
    k = kernel.shape[0]
    pad = k // 2 if pad is None else pad
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows = range(0, x.shape[1] - k + 1, stride)
    windows = [[np.tensordot(x[:, r : r + k, c : c + k], kernel, 3) for c in rows] for r in rows]
    return np.moveaxis(np.array(windows), 2, 0) + bias


def norm_silu(x, scale):
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-4) * scale
    return x / (1 + np.exp(-x))


def randomised(module, *inputs):
    """Parameters that are nowhere 0 or 1."""
    params = module.init(jax.random.key(0), *inputs)["params"]
    return jax.tree.map(lambda x: x + jnp.float32(0.3 * RNG.normal(size=x.shape)), params)


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)


def test_encoder():
    """5 x 5 convolution, maximum of 2 x 2, RMSNorm over channels, silu; two stages of 2 and 3 times the depth."""
    x = RNG.uniform(-0.5, 0.5, (2, 16, 16, 3))
    module = ImageEncoder(2)
    params = randomised(module, jnp.float32(x))
    y = x
    for i in range(2):
        y = convolve(y, params[f"conv{i}"]["kernel"], params[f"conv{i}"]["bias"])
        n, h, w, c = y.shape
        y = y.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))
        y = norm_silu(y, params[f"norm{i}"]["scale"])
    assert y.shape == (2, 4, 4, 6)
    close(module.apply({"params": params}, jnp.float32(x)), y.reshape(2, -1))


def test_flat_networks():
    """MLPs from all pixels to a vector, as differences from each channel's mean and that mean, and from h and z
    to the brightness of every pixel."""
    x, h, z = RNG.uniform(-0.5, 0.5, (2, 4, 3, 3)), RNG.normal(size=(2, 5)), RNG.normal(size=(2, 3))

    def layer(params, x):
        return norm_silu(x @ params["linear"]["kernel"] + params["linear"]["bias"], params["norm"]["scale"])

    read = FlatEncoder(layers=2, units=6)
    params = randomised(read, jnp.float32(x))
    mean = x.mean((1, 2))
    pixels = np.concatenate([(x - mean[:, None, None]).reshape(2, -1), mean], -1)
    y = layer(params["mlp"]["dense1"], layer(params["mlp"]["dense0"], pixels))
    close(read.apply({"params": params}, jnp.float32(x)), y)
    draw = FlatDecoder((4, 3, 3), layers=1, units=6)
    params = randomised(draw, jnp.float32(h), jnp.float32(z))["mlp"]
    y = layer(params["dense0"], np.concatenate([h, z], -1)) @ params["out"]["kernel"] + params["out"]["bias"]
    drawn = draw.apply({"params": {"mlp": params}}, jnp.float32(h), jnp.float32(z))
    close(drawn, (1 / (1 + np.exp(-y))).reshape(2, 4, 3, 3))


def test_upsampling_convolution():
    """The product on the small image equals upsampling first, borders included."""
    x = RNG.normal(size=(2, 4, 3, 2))
    module = UpConv(3)
    params = randomised(module, jnp.float32(x))
    large = x.repeat(2, 1).repeat(2, 2)
    square = np.pad(large, ((0, 0), (0, 0), (0, 2), (0, 0)))  # the loop above wants squares
    y = convolve(square, params["kernel"], params["bias"])[:, :, :6]
    close(module.apply({"params": params}, jnp.float32(x)), y)


def test_decoder():
    """Blocks of h draw channels of their own, z all of them; then upsampling stages, and brightness in [0, 1]."""
    h, z = RNG.normal(size=(2, 12)), RNG.normal(size=(2, 5))
    module = ImageDecoder((16, 16, 3), depth=2, units=3, blocks=3)
    params = randomised(module, jnp.float32(h), jnp.float32(z))
    channels = []
    for block in range(3):  # 4 numbers of h -> 4 x 4 pixels of 2 channels
        drawn = h[:, 4 * block : 4 * block + 4] @ params["deter"]["kernel"][block]
        drawn = drawn + params["deter"]["bias"].reshape(3, -1)[block]
        channels.append(drawn.reshape(2, 4, 4, 2))
    hidden = params["hidden"]
    y = norm_silu(z @ hidden["linear"]["kernel"] + hidden["linear"]["bias"], hidden["norm"]["scale"])
    assert y.shape == (2, 6)  # twice the units
    y = (y @ params["stoch"]["kernel"] + params["stoch"]["bias"]).reshape(2, 4, 4, 6)
    y = norm_silu(np.concatenate(channels, -1) + y, params["norm"]["scale"])
    up = lambda x: x.repeat(2, 1).repeat(2, 2)
    y = convolve(up(y), params["conv0"]["kernel"], params["conv0"]["bias"])
    y = norm_silu(y, params["norm0"]["scale"])
    assert y.shape == (2, 8, 8, 4)  # the depth times 2
    y = convolve(up(y), params["out"]["kernel"], params["out"]["bias"])
    close(module.apply({"params": params}, jnp.float32(h), jnp.float32(z)), 1 / (1 + np.exp(-y)))


def test_strided_convolutions():
    """TD-MPC2: kernels 7, 5, 3, 3, strides 2, 2, 2, 1, relu between them and none at the end."""
    x = RNG.uniform(-0.5, 0.5, (1, 45, 45, 2))
    module = StridedConvs(3)
    params = randomised(module, jnp.float32(x))
    y = x
    for i, stride in enumerate((2, 2, 2, 1)):
        y = np.maximum(y, 0) if i else y
        y = convolve(y, params[f"conv{i}"]["kernel"], params[f"conv{i}"]["bias"], stride, 0)
    close(module.apply({"params": params}, jnp.float32(x)), y.reshape(1, -1))
    assert images.conv_size((45, 45, 2), 3) == y.size
    assert images.conv_size((64, 64, 9), 32) == 512
    bound = (49 * 2) ** -0.5
    kernel = module.init(jax.random.key(0), jnp.float32(x))["params"]["conv0"]["kernel"]
    assert 0.9 * bound < np.abs(kernel).max() <= bound


def test_random_shift():
    """A whole number of pixels along each axis, the border repeated; every shift occurs, images move alone."""
    image = RNG.integers(0, 256, (300, 6, 5, 2)).astype(np.uint8)
    moved = np.asarray(images.random_shift(jax.random.key(0), jnp.asarray(image), 1))
    assert moved.dtype == np.uint8
    counts = np.zeros((3, 3), int)
    for one, out in zip(image, moved):
        padded = np.pad(one, ((1, 1), (1, 1), (0, 0)), mode="edge")
        found = [(r, c) for r in range(3) for c in range(3) if (padded[r : r + 6, c : c + 5] == out).all()]
        (offset,) = found
        counts[offset] += 1
    assert (counts > 10).all()
    assert (np.asarray(images.random_shift(jax.random.key(0), jnp.asarray(image), 0)) == image).all()


def test_bytes_and_loss():
    """Bytes become [-0.5, 0.5]; the loss is the squared error of brightness, summed over pixels and channels."""
    assert images.centred(jnp.uint8([[[[0, 51, 255]]]])).ravel() == pytest.approx([-0.5, -0.3, 0.5])
    pred, target = RNG.uniform(size=(2, 4, 4, 3)), RNG.integers(0, 256, (2, 4, 4, 3)).astype(np.uint8)
    loss = ImageMSE(jnp.float32(pred)).loss(jnp.asarray(target))
    np.testing.assert_allclose(loss, ((pred - target / 255.0) ** 2).sum((1, 2, 3)), rtol=1e-5)


def test_split_and_stack():
    obs = {
        "b": ArraySpec((8, 8, 3), "uint8"),
        "a": ArraySpec((8, 8, 1), "uint8"),
        "flat": ArraySpec((8,), "uint8"),
        "state": ArraySpec((3,)),
    }
    found, vectors = images.split_obs(obs)
    assert (list(found), list(vectors)) == (["a", "b"], ["flat", "state"])
    assert images.stacked_shape(found) == (8, 8, 4)
    values = {k: jnp.asarray(RNG.integers(0, 256, (2, *obs[k].shape)), jnp.uint8) for k in found}
    stacked = images.stack_images(values, found)
    assert stacked.dtype == jnp.uint8
    parts = images.unstack_images(stacked, found)
    assert all((parts[k] == values[k]).all() for k in found)
    with pytest.raises(UserError, match="the images a, b have sizes"):
        images.split_obs(obs | {"b": ArraySpec((4, 8, 3), "uint8")})


@pytest.mark.parametrize(
    "size, count", [((64, 64, 3), 4), ((96, 96, 1), 4), ((32, 64, 3), 3), ((8, 8, 3), 1)]
)
def test_stages(size, count):
    assert images.stages(size) == count


@pytest.mark.parametrize("size", [(7, 8, 3), (36, 36, 3)])
def test_impossible_sizes(size):
    with pytest.raises(UserError, match="multiples of"):
        images.stages(size)


def test_impossible_networks():
    with pytest.raises(UserError, match=r"model.image_blocks is 3, it must divide the memory's width, 16"):
        images.check_decoder((8, 8, 3), 3, 3, 16)
    with pytest.raises(UserError, match="sides of at least 39"):
        images.conv_size((38, 64, 3), 32)


def test_dtype():
    """Activations in bfloat16 where the input is; pictures are float32."""
    x = jnp.zeros((1, 8, 8, 3), jnp.bfloat16)
    encoder, decoder = ImageEncoder(2), ImageDecoder((8, 8, 3), 2, 4, 2)
    out = encoder.init_with_output(jax.random.key(0), x)[0]
    assert out.dtype == jnp.bfloat16 and Conv(2, 3).init_with_output(jax.random.key(0), x)[0].dtype == x.dtype
    h, z = jnp.zeros((1, 4), jnp.bfloat16), jnp.zeros((1, 4), jnp.bfloat16)
    assert decoder.init_with_output(jax.random.key(0), h, z)[0].dtype == jnp.float32
