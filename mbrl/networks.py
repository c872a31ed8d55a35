"""Layers and small networks shared by world models, actors and critics (DreamerV3, danijar/dreamerv3)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from mbrl.types import ArraySpec

# Standard deviation of a unit normal truncated to [-2, 2]; dividing by it restores unit variance.
MAX_LAYERS = 100  # compile time grows with the layers: a slip of the finger must not trace for hours
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


class Linear(nn.Module):
    """x @ W + b over the last axis. Parameters are float32 and cast to the dtype of ``x``."""

    units: int
    outscale: float = 1.0

    @nn.compact
    def __call__(self, x: Shaped[Array, "*batch i"]) -> Shaped[Array, "*batch o"]:
        fan_in = x.shape[-1]
        kernel = self.param("kernel", trunc_normal_in(fan_in, self.outscale), (fan_in, self.units))
        bias = self.param("bias", nn.initializers.zeros, (self.units,))
        return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)


class BlockLinear(nn.Module):
    """Linear with a block-diagonal kernel: ``blocks`` contiguous groups of features that do not mix.

    ``shared`` features, if given, enter every block behind its own ones; they are multiplied once, as one
    dense product, instead of being repeated per block.
    """

    units: int
    blocks: int
    outscale: float = 1.0

    @nn.compact
    def __call__(
        self, x: Shaped[Array, "*batch i"], shared: Shaped[Array, "*batch j"] | None = None
    ) -> Shaped[Array, "*batch o"]:
        g, own = self.blocks, x.shape[-1] // self.blocks
        rows = own + (0 if shared is None else shared.shape[-1])
        shape = (g, rows, self.units // g)
        kernel = self.param("kernel", trunc_normal_in(g * rows, self.outscale), shape).astype(x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.units,))
        # Blocks in front: XLA's batched product on a CPU is twice as fast that way.
        groups = jnp.moveaxis(x.reshape(*x.shape[:-1], g, own), -2, 0)
        flat = groups.reshape(g, -1, own) @ kernel[:, :own]
        y = jnp.moveaxis(flat, 0, 1).reshape(*x.shape[:-1], self.units)
        if shared is not None:
            y = y + shared @ jnp.moveaxis(kernel[:, own:], 0, 1).reshape(-1, self.units)
        return y + bias.astype(x.dtype)


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


def flatten_obs(
    obs: dict[str, Any], spec: dict[str, ArraySpec], dtype: Any = jnp.float32
) -> Float[Array, "*batch i"]:
    """Concatenates vector observations, sorted by key: symlog if continuous, one-hot if discrete."""
    parts = []
    for key in sorted(spec):
        entry, value = spec[key], obs[key]
        batch = value.shape[: value.ndim - len(entry.shape)]
        if entry.classes is None:
            value = symlog(value.astype(jnp.float32))
        else:
            value = jax.nn.one_hot(value, entry.classes)
        parts.append(value.reshape(*batch, -1))
    return jnp.concatenate(parts, -1).astype(dtype)
