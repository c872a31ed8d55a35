"""A small anti-aliased rasteriser in JAX: tasks have pictures inside compiled programs, without OpenGL.

A shape is its signed distance to every pixel's centre; how much of a pixel it covers is a ramp one pixel
wide around its outline.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

Picture = Float[Array, "h w 3"]
Distance = Float[Array, "h w"]


def pixel_centres(size: int, extent: float) -> Float[Array, "h w 2"]:
    """Where the pixels of a square picture lie, x to the right and y up, within [-extent, extent]."""
    line = (jnp.arange(size) + 0.5) / size * 2 - 1
    return extent * jnp.stack(jnp.meshgrid(line, -line), -1)


def capsule(points: Float[Array, "h w 2"], start: Array, end: Array, radius: float) -> Distance:
    """Distance to a line with round ends; a disc where start and end [2] are the same."""
    along, offset = end - start, points - start
    share = jnp.clip((offset * along).sum(-1) / jnp.maximum((along * along).sum(), 1e-9), 0, 1)
    return jnp.linalg.norm(offset - share[..., None] * along, axis=-1) - radius


def rectangle(points: Float[Array, "h w 2"], centre: Array, half: tuple[float, float]) -> Distance:
    """Distance to an upright rectangle, given by its centre [2] and half its sides."""
    over = jnp.abs(points - centre) - jnp.array(half)
    return jnp.linalg.norm(jnp.maximum(over, 0), axis=-1) + jnp.minimum(over.max(-1), 0)


def paint(picture: Picture, distance: Distance, colour: tuple[int, int, int], pixel: float) -> Picture:
    """The picture with a shape of one colour (bytes) over it; ``pixel`` is the side of a pixel."""
    cover = jnp.clip(0.5 - distance / pixel, 0, 1)[..., None]
    return (1 - cover) * picture + cover * jnp.array(colour, jnp.float32)


def to_bytes(picture: Picture) -> UInt8[Array, "h w 3"]:
    return jnp.round(picture).astype(jnp.uint8)
