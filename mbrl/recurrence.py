"""Sequences with episode starts: what came before a step, and linear recurrences, in order or in parallel."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Complex, Float, Shaped

ScanImpl = Literal["auto", "associative", "sequential"]


def previous(sequence: Shaped[Array, "T *rest"], carried: Shaped[Array, "*rest"]) -> Shaped[Array, "T *rest"]:
    """The value of the step before, at every step; at the first one that which was carried there."""
    return jnp.concatenate([carried[None], sequence[:-1]])


def clear(is_first: Bool[Array, "*batch"], x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """x [*batch, *rest], but 0 where an episode begins, whatever was there, even if not finite (a product
    with 0 would keep that)."""
    return jnp.where(is_first.reshape(*is_first.shape, *[1] * (x.ndim - is_first.ndim)), 0, x)


def linear_recurrence(
    a: Complex[Array, "P"],
    b: Complex[Array, "T *batch P"],
    is_first: Bool[Array, "T *batch"],
    initial: Complex[Array, "*batch P"],
    reset: Complex[Array, "P"],
    impl: ScanImpl = "auto",
) -> Complex[Array, "T *batch P"]:
    """s_t = a s_{t-1} + b_t, where s_{t-1} is ``reset`` at an episode start.

    associative: jax.lax.associative_scan with the reset folded into the coefficients, a_t = a (1 - first_t)
    and b_t + first_t a reset, which is exact for any reset state and needs no flag in the operator.
    sequential: jax.lax.scan of this elementwise recurrence; as fast on a CPU and compiles in half the time.
    auto: sequential on a CPU, else associative.
    """
    if impl == "auto":
        impl = "sequential" if jax.default_backend() == "cpu" else "associative"
    if impl == "sequential":

        def step(state, inputs):
            first, b = inputs
            state = a * jnp.where(first[..., None], reset, state) + b
            return state, state

        return jax.lax.scan(step, initial, (is_first, b))[1]
    first = is_first[..., None]
    b = b + jnp.where(first, a * reset, 0)
    b = b.at[0].add(jnp.where(first[0], 0, a * initial))
    _, states = jax.lax.associative_scan(_compose, (jnp.where(first, 0, a), b))
    return states


def _compose(early, late):
    """First ``early``, then ``late``, each the affine map s -> a s + b."""
    return late[0] * early[0], late[0] * early[1] + late[1]


def from_planes(planes: Float[Array, "*batch 2 P"]) -> Complex[Array, "*batch P"]:
    """Real and imaginary parts, as a state is carried and stored, as complex numbers."""
    return jax.lax.complex(planes[..., 0, :], planes[..., 1, :])


def to_planes(x: Complex[Array, "*batch P"]) -> Float[Array, "*batch 2 P"]:
    """Inverse of `from_planes`."""
    return jnp.stack([x.real, x.imag], -2)
