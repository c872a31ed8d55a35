"""Layers and small networks shared by world models, actors and critics: those of DreamerV3
(danijar/dreamerv3) and those of TD-MPC2 (arXiv 2310.16828)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from mbrl.types import ArraySpec

MAX_LAYERS = 100  # compile time grows with the layers: a slip of the finger must not trace for hours
# Standard deviation of a unit normal truncated to [-2, 2]; dividing by it restores unit variance.
TRUNCATED_STD = 0.87962566


def apply(module: nn.Module, params: Any, *args: Any, method: str | None = None) -> Any:
    """``module`` as a pure function of its parameters."""
    return module.apply({"params": params}, *args, method=method)


def symlog(x: Array) -> Array:
    """sign(x) log(1 + |x|): compresses magnitude, identity near zero (DreamerV3 eq. 9)."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def symexp(x: Array) -> Array:
    """Inverse of `symlog`."""
    return jnp.sign(x) * jnp.expm1(jnp.abs(x))


def trunc_normal_in(fan_in: int, outscale: float):
    """Truncated normal of variance outscale^2 / fan_in. ``fan_in`` counts the FULL input width, also for
    block layers, so those start sqrt(blocks) smaller than a per-block initialisation would."""

    def init(key, shape, dtype=jnp.float32):
        std = outscale / TRUNCATED_STD / np.sqrt(fan_in)
        return std * jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)

    return init


@jax.custom_vjp
def product(x: Shaped[Array, "*batch i"], kernel: Shaped[Array, "i o"]) -> Shaped[Array, "*batch o"]:
    """x @ kernel. The kernel's gradient has the narrower of its two axes in front when it is summed over the
    rows: the other way round, XLA's product on a CPU is 2 to 4 times slower (docs/performance.md)."""
    return x @ kernel


def _product_forward(x, kernel):
    return product(x, kernel), (x, kernel)


def _product_backward(saved, cotangent):
    x, kernel = saved
    rows = tuple(range(x.ndim - 1))
    narrow, wide = (cotangent, x) if cotangent.shape[-1] <= x.shape[-1] else (x, cotangent)
    # The barrier keeps the transposition out of the product.
    gradient = jax.lax.optimization_barrier(jnp.tensordot(narrow, wide, (rows, rows)))
    return cotangent @ kernel.T, gradient.T if narrow is cotangent else gradient


product.defvjp(_product_forward, _product_backward)


class Linear(nn.Module):
    """x @ W + b over the last axis. Parameters are float32 and cast to the dtype of ``x``."""

    units: int
    outscale: float = 1.0
    kernel_init: Callable[..., Any] | None = None
    """Initialiser of the kernel where it is another one."""

    @nn.compact
    def __call__(self, x: Shaped[Array, "*batch i"]) -> Shaped[Array, "*batch o"]:
        fan_in = x.shape[-1]
        init = self.kernel_init or trunc_normal_in(fan_in, self.outscale)
        kernel = self.param("kernel", init, (fan_in, self.units))
        bias = self.param("bias", nn.initializers.zeros, (self.units,))
        return product(x, kernel.astype(x.dtype)) + bias.astype(x.dtype)


class BlockLinear(nn.Module):
    """Linear with a block-diagonal kernel: ``blocks`` contiguous groups of features that do not mix.

    ``shared`` features, if given, enter every block behind its own ones; they are multiplied once, as one
    dense product, instead of being repeated per block.
    """

    units: int
    blocks: int
    outscale: float = 1.0

    def __call__(
        self, x: Shaped[Array, "*batch i"], shared: Shaped[Array, "*batch j"] | None = None
    ) -> Shaped[Array, "*batch o"]:
        return self.cut(x, shared)[0]

    @nn.compact
    def cut(
        self, x: Shaped[Array, "*batch i"], shared: Shaped[Array, "*batch j"] | None = None, parts: int = 1
    ) -> list[Shaped[Array, "*batch p"]]:
        """The output of every block cut into ``parts``, and each of these joined over the blocks."""
        g, own = self.blocks, x.shape[-1] // self.blocks
        rows = own + (0 if shared is None else shared.shape[-1])
        shape = (g, rows, self.units // g)
        kernel = self.param("kernel", trunc_normal_in(g * rows, self.outscale), shape).astype(x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.units,)).astype(x.dtype).reshape(g, -1)
        # Blocks in front: XLA's batched product on a CPU is twice as fast that way.
        groups = jnp.moveaxis(x.reshape(*x.shape[:-1], g, own), -2, 0)
        flat = groups.reshape(g, -1, own) @ kernel[:, :own]

        def joined(flat, kernel, bias):
            y = jnp.concatenate([y[0] for y in jnp.split(flat, g)], -1).reshape(*x.shape[:-1], -1)
            if shared is not None:
                y = y + shared @ jnp.moveaxis(kernel[:, own:], 0, 1).reshape(shared.shape[-1], -1)
            return y + bias.reshape(-1)

        # Cut before the bias is added: XLA on a CPU evaluates a slice of a sum one element at a time.
        cuts = [jnp.split(array, parts, -1) for array in (flat, kernel, bias)]
        return [joined(*part) for part in zip(*cuts, strict=True)]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-4) * scale over the whole last axis, computed in float32."""

    @nn.compact
    def __call__(self, x: Shaped[Array, "*batch f"]) -> Shaped[Array, "*batch f"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + 1e-4) * scale
        return y.astype(x.dtype)


class Dense(nn.Module):
    """Linear, RMSNorm, silu: the unit that every network here is built from."""

    units: int
    blocks: int = 1

    @nn.compact
    def __call__(self, x: Shaped[Array, "*batch i"]) -> Shaped[Array, "*batch o"]:
        if self.blocks > 1:
            x = BlockLinear(self.units, self.blocks, name="linear")(x)
        else:
            x = Linear(self.units, name="linear")(x)
        return nn.silu(RMSNorm(name="norm")(x))


class MLP(nn.Module):
    """``layers`` x Dense, then an optional linear output of ``out`` units initialised with ``outscale``."""

    layers: int
    units: int
    out: int | None = None
    outscale: float = 1.0

    @nn.compact
    def __call__(self, x: Shaped[Array, "*batch i"]) -> Shaped[Array, "*batch o"]:
        for i in range(self.layers):
            x = Dense(self.units, name=f"dense{i}")(x)
        return x if self.out is None else Linear(self.out, self.outscale, name="out")(x)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + 1e-5) * scale + bias over the last axis, computed in float32."""

    @nn.compact
    def __call__(self, x: Shaped[Array, "*batch f"]) -> Shaped[Array, "*batch f"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-5) * scale + bias
        return y.astype(x.dtype)


def mish(x: Array) -> Array:
    """x tanh(softplus(x)) (arXiv 1908.08681). tanh(log(1 + e)) is a ratio of polynomials in e = exp(x): one
    transcendental function instead of three, and 1 to float32 from x = 20 on."""
    e = jnp.exp(jnp.minimum(x, 20.0))
    top = e * (e + 2)
    return x * (top / (top + 2))


def simnorm(x: Shaped[Array, "*batch f"], group: int) -> Shaped[Array, "*batch f"]:
    """Softmax within each ``group`` neighbouring features: simplicial normalisation (TD-MPC2, eq. 5, with
    temperature 1)."""
    groups = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, group)
    return jax.nn.softmax(groups).reshape(x.shape).astype(x.dtype)


class NormedMLP(nn.Module):
    """TD-MPC2's network: ``layers`` x (linear, dropout in the first, LayerNorm, mish), then a linear output.
    Kernels start normal with deviation 0.02, those of the output too unless ``zero_out``.

    simnorm: where given, the output is layer-normed, then `simnorm` in groups of this size.
    """

    layers: int
    units: int
    out: int
    simnorm: int = 0
    dropout: float = 0.0
    zero_out: bool = False

    @nn.compact
    def __call__(self, x: Shaped[Array, "*batch i"], key: Array | None = None) -> Shaped[Array, "*batch o"]:
        """key: randomness of the dropout; None switches it off."""
        for i in range(self.layers):
            x = self._linear(f"linear{i}", x, self.units)
            if i == 0 and self.dropout and key is not None:
                keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
                x = jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)
            x = mish(LayerNorm(name=f"norm{i}")(x))
        x = self._linear("out", x, self.out, 0.0 if self.zero_out else 0.02)
        return simnorm(LayerNorm(name="out_norm")(x), self.simnorm) if self.simnorm else x

    def _linear(self, name: str, x: Array, units: int, std: float = 0.02) -> Array:
        return Linear(units, kernel_init=nn.initializers.normal(std), name=name)(x)


def flatten_obs(
    obs: dict[str, Any],
    spec: dict[str, ArraySpec],
    dtype: Any = jnp.float32,
    squash: Callable[[Array], Array] = symlog,
) -> Float[Array, "*batch i"]:
    """Concatenates vector observations, sorted by key: ``squash`` of continuous ones, one-hot of discrete."""
    parts = []
    for key in sorted(spec):
        entry, value = spec[key], obs[key]
        batch = value.shape[: value.ndim - len(entry.shape)]
        if entry.classes is None:
            value = squash(value.astype(jnp.float32))
        else:
            value = jax.nn.one_hot(value, entry.classes)
        parts.append(value.reshape(*batch, -1))
    return jnp.concatenate(parts, -1).astype(dtype)
