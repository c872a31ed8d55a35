"""The pendulum swing-up of dm_control, written in JAX.

A point-like mass on a massless rod, turned by a motor too weak to lift it in one go. Constants from
``dm_control/suite/pendulum.xml``, integration as MuJoCo's default: semi-implicit Euler with the joint
damping treated implicitly.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mbrl.envs import raster
from mbrl.types import Array, ArraySpec, EnvSpec, JaxEnv, TimeStep

MASS = 1.0  # kg
LENGTH = 0.5  # m, from the hinge to the centre of the ball
RADIUS = 0.05  # m, of the ball
GRAVITY = 9.81  # m/s^2
DAMPING = 0.1  # N m s/rad
GEAR = 1.0  # N m per unit of action
TIMESTEP = 0.02  # s
FRAMES = 1000  # of an episode, 20 s
UPRIGHT = math.cos(math.radians(8))  # cosine from which the pole counts as upright

INERTIA = MASS * LENGTH**2 + 0.4 * MASS * RADIUS**2  # kg m^2, about the hinge; the ball is a solid sphere


class State(NamedTuple):
    """angle: float [], rad in [-pi, pi), 0 is upright. velocity: float [], rad/s. step: int32 []."""

    angle: Array
    velocity: Array
    step: Array


def make(max_steps: int | None = None, action_repeat: int = 2, dense: bool = False) -> JaxEnv:
    """The swing-up with dm_control's observations: orientation (2,) = (cos, sin), velocity (1,) in rad/s.

    max_steps: agent steps of an episode, by default 1000 frames as in dm_control; it ends by truncation
    only. Reward per frame, summed over the action repeat: 1 within 8 degrees of upright and else 0, as in
    dm_control; with ``dense`` the smooth (1 + cos angle) / 2. Starts at rest at an angle uniform in
    [-pi, pi). Raises ValueError for counts below 1.
    """
    if action_repeat < 1:
        raise ValueError(f"action_repeat must be at least 1, found {action_repeat}.")
    if max_steps is None:
        max_steps = math.ceil(FRAMES / action_repeat)
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, found {max_steps}.")

    spec = EnvSpec(
        name="pendulum_dense" if dense else "pendulum",
        obs={"orientation": ArraySpec((2,)), "velocity": ArraySpec((1,))},
        action=ArraySpec((1,)),
        action_repeat=action_repeat,
        max_steps=max_steps,
    )

    def reward_of(angle: Array) -> Array:
        cosine = jnp.cos(angle)
        return (1 + cosine) / 2 if dense else (cosine >= UPRIGHT).astype(angle.dtype)

    def reset(key: Array) -> tuple[State, TimeStep]:
        angle = jax.random.uniform(key, (), minval=-jnp.pi, maxval=jnp.pi)
        state = State(angle, jnp.zeros(()), jnp.zeros((), jnp.int32))
        # Two arrays for two fields: leaves that share a buffer cannot be donated.
        return state, TimeStep(observe(state), jnp.zeros(()), jnp.zeros((), bool), jnp.zeros((), bool))

    def step(state: State, action: Array, key: Array) -> tuple[State, TimeStep]:
        del key  # deterministic
        angle, velocity, reward = state.angle, state.velocity, jnp.zeros_like(state.angle)
        torque = GEAR * jnp.clip(action[0], -1, 1)
        for _ in range(action_repeat):
            angle, velocity = integrate(angle, velocity, torque)
            reward += reward_of(angle)
        state = State(angle, velocity, state.step + 1)
        return state, TimeStep(observe(state), reward, state.step >= max_steps, jnp.zeros((), bool))

    return JaxEnv(spec, reset, step)


make_dense = functools.partial(make, dense=True)


def integrate(angle: Array, velocity: Array, torque: Array) -> tuple[Array, Array]:
    """One frame of dynamics. angle [] rad, velocity [] rad/s, torque [] N m; returns the next two."""
    force = torque + MASS * GRAVITY * LENGTH * jnp.sin(angle) - DAMPING * velocity
    # MuJoCo evaluates the damping at the next velocity, which adds dt * damping to the inertia.
    velocity = velocity + TIMESTEP * force / (INERTIA + TIMESTEP * DAMPING)
    angle = angle + TIMESTEP * velocity
    # Wrapped, since a float32 angle loses digits after some turns.
    return (angle + jnp.pi) % (2 * jnp.pi) - jnp.pi, velocity


def observe(state: State) -> dict[str, Array]:
    """orientation [2] = (cos, sin) of the angle from upright, velocity [1]."""
    return {
        "orientation": jnp.stack([jnp.cos(state.angle), jnp.sin(state.angle)]),
        "velocity": state.velocity[None],
    }


def picture(state: State, size: int) -> Array:
    """What a camera in front of the pendulum sees, uint8 [size, size, 3]: a rod and a ball, drawn thicker
    than they are."""
    points, pixel = raster.pixel_centres(size, 0.7), 1.4 / size
    ball = LENGTH * jnp.stack([jnp.sin(state.angle), jnp.cos(state.angle)])
    image = jnp.full((size, size, 3), 30.0)
    image = raster.paint(image, raster.capsule(points, jnp.zeros(2), ball, 0.04), (150, 150, 160), pixel)
    image = raster.paint(image, raster.capsule(points, ball, ball, 0.12), (240, 170, 40), pixel)
    return raster.to_bytes(image)
