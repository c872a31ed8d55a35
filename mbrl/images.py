"""Image observations: which they are, and the networks that read and draw them: DreamerV3's
(danijar/dreamerv3) and TD-MPC2's (arXiv 2310.16828)."""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8

from mbrl.errors import UserError
from mbrl.networks import MLP, BlockLinear, Dense, Linear, RMSNorm, trunc_normal_in
from mbrl.types import ArraySpec

SMALLEST = 4
"""Rows and columns below which an image is not halved further."""
WIDTHS = 2, 3, 4, 4
"""Channels of each stage that halves an image, as multiples of the depth."""

Reading = Literal["conv", "mlp"]


def is_image(entry: ArraySpec) -> bool:
    """Images are uint8 [height, width, channels]."""
    return entry.dtype == "uint8" and len(entry.shape) == 3


def split_obs(obs: dict[str, ArraySpec]) -> tuple[dict[str, ArraySpec], dict[str, ArraySpec]]:
    """Images and vectors of an observation, sorted by key. UserError where images differ in size, as they are
    stacked along their channels."""
    images = {key: obs[key] for key in sorted(obs) if is_image(obs[key])}
    sizes = sorted({entry.shape[:2] for entry in images.values()})
    if len(sizes) > 1:
        raise UserError(f"the images {', '.join(images)} have sizes {sizes}, they must have the same")
    return images, {key: obs[key] for key in sorted(obs) if key not in images}


def stacked_shape(images: dict[str, ArraySpec]) -> tuple[int, int, int]:
    """[height, width, channels] of all images stacked along channels."""
    height, width = next(iter(images.values())).shape[:2]
    return height, width, sum(entry.shape[2] for entry in images.values())


def stack_images(obs: dict[str, Any], images: dict[str, ArraySpec]) -> UInt8[Array, "*batch h w c"]:
    """All images as one, along their channels."""
    return jnp.concatenate([obs[key] for key in images], -1)


def unstack_images(stacked: Array, images: dict[str, ArraySpec]) -> dict[str, Array]:
    """Inverse of `stack_images`."""
    ends = np.cumsum([entry.shape[2] for entry in images.values()])[:-1]
    return dict(zip(images, jnp.split(stacked, ends, -1), strict=True))


def centred(image: UInt8[Array, "*batch h w c"]) -> Float[Array, "*batch h w c"]:
    """Bytes as numbers in [-0.5, 0.5]."""
    return image.astype(jnp.float32) / 255 - 0.5


def stages(shape: tuple[int, ...]) -> int:
    """How often an image [h, w, c] is halved: until `SMALLEST`, at most as often as there are `WIDTHS`.
    UserError where it cannot be halved evenly."""
    count = min(len(WIDTHS), int(np.log2(max(1, min(shape[:2]) / SMALLEST))))
    if count < 1 or any(size % 2**count for size in shape[:2]):
        raise UserError(
            f"images are {shape[0]} x {shape[1]}, sides must be at least {2 * SMALLEST} and multiples of "
            f"{2 ** max(1, count)}"
        )
    return count


class Conv(nn.Module):
    """Convolution [N, h, w, i] -> [N, h', w', units] with bias. padding: SAME keeps the size at stride 1."""

    units: int
    kernel: int
    stride: int = 1
    padding: Literal["SAME", "VALID"] = "SAME"
    outscale: float = 1.0
    kernel_init: Any = None
    """Initialiser of the kernel where it is another one."""

    @nn.compact
    def __call__(self, x: Shaped[Array, "n h w i"]) -> Shaped[Array, "n h2 w2 o"]:
        fan_in = self.kernel**2 * x.shape[-1]
        init = self.kernel_init or trunc_normal_in(fan_in, self.outscale)
        kernel = self.param("kernel", init, (self.kernel, self.kernel, x.shape[-1], self.units))
        bias = self.param("bias", nn.initializers.zeros, (self.units,))
        return _convolve(x, kernel.astype(x.dtype), self.stride, self.padding) + bias.astype(x.dtype)


class UpConv(nn.Module):
    """Nearest-neighbour upsampling by 2, then a 5 x 5 convolution: [N, h, w, i] -> [N, 2h, 2w, units].

    Computed on the small image: each of the four pixels that one becomes sees 3 x 3 of the small ones, with
    sums of the kernel's entries. The same function with 36 products where there were 100.
    """

    units: int
    outscale: float = 1.0

    @nn.compact
    def __call__(self, x: Shaped[Array, "n h w i"]) -> Shaped[Array, "n h2 w2 o"]:
        shape = (5, 5, x.shape[-1], self.units)
        kernel = self.param("kernel", trunc_normal_in(25 * x.shape[-1], self.outscale), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.units,))
        sums = jnp.einsum("pat,qbs,tsio->abipqo", _PHASES, _PHASES, kernel).reshape(3, 3, x.shape[-1], -1)
        return unfold(_convolve(x, sums.astype(x.dtype))) + bias.astype(x.dtype)


# [phase, small pixel, entry of the kernel]: which of 3 neighbours the entry falls on.
_PHASES = np.array(
    [
        [[(phase + entry - 2) // 2 + 1 == near for entry in range(5)] for near in range(3)]
        for phase in range(2)
    ],
    np.float32,
)


def _convolve(x: Array, kernel: Array, stride: int = 1, padding: str = "SAME") -> Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=layout)


def fold(x: Shaped[Array, "n h w c"]) -> Shaped[Array, "n h2 w2 c4"]:
    """Each 2 x 2 patch as one pixel with four times the channels."""
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).swapaxes(2, 3).reshape(n, h // 2, w // 2, 4 * c)


def unfold(x: Shaped[Array, "n h w c4"]) -> Shaped[Array, "n h2 w2 c"]:
    """Inverse of `fold`."""
    n, h, w, c = x.shape
    return x.reshape(n, h, w, 2, 2, c // 4).swapaxes(2, 3).reshape(n, 2 * h, 2 * w, c // 4)


class ImageEncoder(nn.Module):
    """Images [..., h, w, c] -> [..., features]: stages that halve the image, each a 5 x 5 convolution, the
    maximum of each 2 x 2 patch, RMSNorm over the channels and silu; flattened at the end."""

    depth: int

    @nn.compact
    def __call__(self, x: Shaped[Array, "*batch h w c"]) -> Shaped[Array, "*batch o"]:
        batch, x = x.shape[:-3], x.reshape(-1, *x.shape[-3:])
        for i, width in enumerate(WIDTHS[: stages(x.shape[1:])]):
            units = self.depth * width
            x = Conv(units, 5, name=f"conv{i}")(x)
            x = fold(x).reshape(*_halved(x.shape), 4, units).max(-2)
            x = nn.silu(RMSNorm(name=f"norm{i}")(x))
        return x.reshape(*batch, -1)


def _halved(shape: tuple[int, ...]) -> tuple[int, int, int]:
    return shape[0], shape[1] // 2, shape[2] // 2


class ImageDecoder(nn.Module):
    """Memory h and latent z -> images [..., height, width, channels] in [0, 1], stage by stage as the encoder
    in reverse. Each block of h draws its own channels of the first small image, z all of them."""

    shape: tuple[int, int, int]
    depth: int
    units: int
    blocks: int

    @nn.compact
    def __call__(
        self, deter: Shaped[Array, "*batch d"], stoch: Shaped[Array, "*batch s"]
    ) -> Float[Array, "*batch h w c"]:
        count, batch, g = stages(self.shape), deter.shape[:-1], self.blocks
        widths = WIDTHS[:count]
        height, width, channels = (self.shape[0] >> count, self.shape[1] >> count, self.depth * widths[-1])
        size = height * width * channels
        x = BlockLinear(size, g, name="deter")(deter.reshape(-1, deter.shape[-1]))
        x = jnp.moveaxis(x.reshape(-1, g, height, width, channels // g), 1, 3)
        y = Linear(size, name="stoch")(
            Dense(2 * self.units, name="hidden")(stoch.reshape(-1, stoch.shape[-1]))
        )
        x = x.reshape(-1, height, width, channels) + y.reshape(-1, height, width, channels)
        x = nn.silu(RMSNorm(name="norm")(x))
        for i, multiple in enumerate(reversed(widths[:-1])):
            x = nn.silu(RMSNorm(name=f"norm{i}")(UpConv(self.depth * multiple, name=f"conv{i}")(x)))
        x = UpConv(self.shape[2], name="out")(x)
        return jax.nn.sigmoid(x.astype(jnp.float32)).reshape(*batch, *self.shape)


class FlatEncoder(nn.Module):
    """Images [..., h, w, c] -> [..., units]: an MLP of all pixels, for small pictures from a fixed camera. It
    reads each channel as its mean and what differs from it: else an even background outweighs, in the first
    layer's norm, the few pixels that move."""

    layers: int
    units: int

    @nn.compact
    def __call__(self, x: Shaped[Array, "*batch h w c"]) -> Shaped[Array, "*batch o"]:
        mean = x.mean((-3, -2))
        rest = (x - mean[..., None, None, :]).reshape(*x.shape[:-3], -1)
        return MLP(self.layers, self.units, name="mlp")(jnp.concatenate([rest, mean], -1))


class FlatDecoder(nn.Module):
    """Memory h and latent z -> images [..., height, width, channels] in [0, 1]: an MLP with an output for
    every pixel."""

    shape: tuple[int, int, int]
    layers: int
    units: int

    @nn.compact
    def __call__(
        self, deter: Shaped[Array, "*batch d"], stoch: Shaped[Array, "*batch s"]
    ) -> Float[Array, "*batch h w c"]:
        x = jnp.concatenate([deter, stoch], -1)
        x = MLP(self.layers, self.units, int(np.prod(self.shape)), name="mlp")(x)
        return jax.nn.sigmoid(x.astype(jnp.float32)).reshape(*deter.shape[:-1], *self.shape)


def check_decoder(shape: tuple[int, int, int], depth: int, blocks: int, deter: int) -> None:
    """UserError where the blocks of `ImageDecoder` do not divide the memory's width or the channels."""
    channels = depth * WIDTHS[stages(shape) - 1]
    for name, size in (("the memory's width", deter), ("the channels of the smallest image", channels)):
        if blocks < 1 or size % blocks:
            raise UserError(f"model.image_blocks is {blocks}, it must divide {name}, {size}")


def random_shift(key: Array, image: UInt8[Array, "b h w c"], most: int) -> UInt8[Array, "b h w c"]:
    """Each image moved by a whole number of pixels in [-most, most] along both axes, its border repeated
    (DrQ, arXiv 2004.13649)."""
    if not most:
        return image
    height, width, channels = image.shape[1:]
    padded = jnp.pad(image, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    offsets = jax.random.randint(key, (image.shape[0], 2), 0, 2 * most + 1)

    def crop(one, offset):
        return jax.lax.dynamic_slice(one, (offset[0], offset[1], 0), (height, width, channels))

    return jax.vmap(crop)(padded, offsets)


class StridedConvs(nn.Module):
    """TD-MPC2's convolutions: images [N, h, w, c] in [-0.5, 0.5] -> features [N, o], 512 of 64 x 64 images
    with 32 channels. Kernels of 7, 5, 3 and 3 with strides 2, 2, 2 and 1, no padding, relu between them;
    initialised as PyTorch initialises convolutions, uniformly within 1 / sqrt(fan-in)."""

    channels: int

    @nn.compact
    def __call__(self, x: Shaped[Array, "n h w c"]) -> Shaped[Array, "n o"]:
        for i, (kernel, stride) in enumerate(TDMPC_STAGES):
            bound = (kernel**2 * x.shape[-1]) ** -0.5
            init = lambda key, shape, b=bound: jax.random.uniform(key, shape, minval=-b, maxval=b)
            x = nn.relu(x) if i else x
            x = Conv(self.channels, kernel, stride, "VALID", kernel_init=init, name=f"conv{i}")(x)
        return x.reshape(x.shape[0], -1)


TDMPC_STAGES = (7, 2), (5, 2), (3, 2), (3, 1)


def conv_size(shape: tuple[int, ...], channels: int) -> int:
    """Features of `StridedConvs`. UserError for images that are too small for them."""
    sides = np.array(shape[:2])
    for kernel, stride in TDMPC_STAGES:
        sides = (sides - kernel) // stride + 1
    if (sides < 1).any():
        raise UserError(f"images are {shape[0]} x {shape[1]}, TD-MPC2's encoder needs sides of at least 39")
    return int(sides.prod()) * channels
