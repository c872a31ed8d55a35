"""The cartpole swing-up of dm_control, written in JAX.

A cart on a rail of limited length pushes a pole from hanging to upright. Constants from
``dm_control/suite/cartpole.xml``; integration as MuJoCo has it there, Runge-Kutta of fourth order. The ends
of the rail are MuJoCo's soft limits, whose force for a single one has a closed form
(mujoco.readthedocs.io, "Computation", sections "Constraint model" and "Solver parameters").
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl.envs import raster
from mbrl.types import Array, ArraySpec, EnvSpec, JaxEnv, TimeStep

CART = 1.0  # kg
POLE = 0.1  # kg
LENGTH = 1.0  # m, of the pole between the centres of its round ends
RADIUS = 0.045  # m, of the pole
GRAVITY = 9.81  # m/s^2
GEAR = 10.0  # N per unit of action
DAMPING = 5e-4, 2e-6  # N s/m of the cart, N m s/rad of the hinge
RAIL = 1.8  # m, to either side
LIMIT_TIME = 0.08  # s, time constant of the soft limit, critically damped
IMPEDANCE = 0.9, 0.95, 0.001  # of the soft limit: at its edge, from a depth on, that depth in m
TIMESTEP = 0.01  # s
FRAMES = 1000  # of an episode, 10 s

ARM = LENGTH / 2  # m, from the hinge to the centre of mass
_ENDS = POLE * 4 * RADIUS / (4 * RADIUS + 3 * LENGTH)  # kg, of the two hemispheres of the capsule
INERTIA = (  # kg m^2, of the pole about the hinge
    POLE * ARM**2
    + (POLE - _ENDS) * (3 * RADIUS**2 + LENGTH**2) / 12
    + _ENDS * (0.4 * RADIUS**2 + LENGTH**2 / 4 + 3 * LENGTH * RADIUS / 8)
)
_COUPLING = POLE * ARM  # kg m
# Inverse inertia of the cart with the pole upright, which scales the softness of the limit.
_INVERSE = INERTIA / ((CART + POLE) * INERTIA - _COUPLING**2)


class State(NamedTuple):
    """position: float [2], of the cart in m and of the pole in rad within [-pi, pi), 0 is upright.
    velocity: float [2], of both. step: int32 []."""

    position: Array
    velocity: Array
    step: Array


def make(max_steps: int | None = None, action_repeat: int = 2) -> JaxEnv:
    """The swing-up with dm_control's observations: position (3,) = (cart in m, cos, sin of the angle from
    upright), velocity (2,) in m/s and rad/s.

    max_steps: agent steps of an episode, by default 1000 frames as in dm_control; it ends by truncation
    only. The reward per frame, in [0, 1], is dm_control's, summed over the action repeat. Starts with the
    pole hanging and at rest, but for noise. Raises ValueError for counts below 1.
    """
    if action_repeat < 1:
        raise ValueError(f"action_repeat must be at least 1, found {action_repeat}.")
    if max_steps is None:
        max_steps = math.ceil(FRAMES / action_repeat)
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, found {max_steps}.")

    spec = EnvSpec(
        name="cartpole",
        obs={"position": ArraySpec((3,)), "velocity": ArraySpec((2,))},
        action=ArraySpec((1,)),
        action_repeat=action_repeat,
        max_steps=max_steps,
    )

    def reset(key: Array) -> tuple[State, TimeStep]:
        noise = 0.01 * jax.random.normal(key, (2, 2))
        state = State(wrap(noise[0] + jnp.array([0.0, jnp.pi])), noise[1], jnp.zeros((), jnp.int32))
        # Two arrays for two fields: leaves that share a buffer cannot be donated.
        return state, TimeStep(observe(state), jnp.zeros(()), jnp.zeros((), bool), jnp.zeros((), bool))

    def step(state: State, action: Array, key: Array) -> tuple[State, TimeStep]:
        del key  # deterministic
        position, velocity, control = state.position, state.velocity, jnp.clip(action[0], -1, 1)
        reward = jnp.zeros_like(control)
        for _ in range(action_repeat):
            position, velocity = integrate(position, velocity, control)
            reward += reward_of(position, velocity, control)
        state = State(position, velocity, state.step + 1)
        return state, TimeStep(observe(state), reward, state.step >= max_steps, jnp.zeros((), bool))

    return JaxEnv(spec, reset, step)


def wrap(position: Array) -> Array:
    """The angle within [-pi, pi), since a float32 angle loses digits after some turns."""
    return position.at[1].set((position[1] + jnp.pi) % (2 * jnp.pi) - jnp.pi)


def integrate(position: Array, velocity: Array, control: Array) -> tuple[Array, Array]:
    """One frame of dynamics by Runge-Kutta; position [2], velocity [2], control [] in [-1, 1]."""
    stages = [(velocity, acceleration(position, velocity, control))]
    for share in (0.5, 0.5, 1.0):
        rate, force = stages[-1]
        moved = position + share * TIMESTEP * rate, velocity + share * TIMESTEP * force
        stages.append((moved[1], acceleration(*moved, control)))
    change = [TIMESTEP / 6 * (a + 2 * b + 2 * c + d) for a, b, c, d in zip(*stages)]
    return wrap(position + change[0]), velocity + change[1]


def acceleration(position: Array, velocity: Array, control: Array) -> Array:
    """Accelerations [2] of cart and pole."""
    sine, cosine = jnp.sin(position[1]), jnp.cos(position[1])
    coupling = _COUPLING * cosine
    push = GEAR * control - DAMPING[0] * velocity[0] + _COUPLING * sine * velocity[1] ** 2
    turn = GRAVITY * _COUPLING * sine - DAMPING[1] * velocity[1]
    determinant = (CART + POLE) * INERTIA - coupling**2
    free = (INERTIA * push - coupling * turn) / determinant
    push += limit_force(position[0], velocity[0], free, INERTIA / determinant)
    return jnp.stack([INERTIA * push - coupling * turn, (CART + POLE) * turn - coupling * push]) / determinant


def limit_force(position: Array, velocity: Array, free: Array, inverse: Array) -> Array:
    """Force [] in N of the rail's end on the cart. free: acceleration without it; inverse: acceleration per
    unit of force. MuJoCo wants (inverse + softness) force = reference - free, and the force not to pull."""
    side, depth = jnp.sign(position), jnp.maximum(jnp.abs(position) - RAIL, 0.0)
    low, high, width = IMPEDANCE
    share = jnp.clip(depth / width, 0.0, 1.0)
    share = jnp.where(share < 0.5, 2 * share**2, 1 - 2 * (1 - share) ** 2)
    impedance = low + (high - low) * share
    stiffness, damping = 1 / (high * LIMIT_TIME) ** 2, 2 / (high * LIMIT_TIME)
    inward = -damping * -side * velocity + stiffness * impedance * depth  # reference acceleration
    softness = (1 - impedance) / impedance * _INVERSE
    force = jnp.maximum((inward + side * free) / (inverse + softness), 0.0)
    return -side * jnp.where(depth > 0, force, 0.0)


def reward_of(position: Array, velocity: Array, control: Array) -> Array:
    """dm_control's reward [] of a frame: upright, centred, with little control and velocity."""
    upright = (jnp.cos(position[1]) + 1) / 2
    centred = (1 + gaussian(position[0], 2.0)) / 2
    small_control = (4 + 1 - control**2) / 5
    small_velocity = (1 + gaussian(velocity[1], 5.0)) / 2
    return upright * small_control * small_velocity * centred


def gaussian(x: Array, margin: float) -> Array:
    """1 at x = 0 and 0.1 at ``margin``: ``rewards.tolerance`` of dm_control."""
    return jnp.exp(np.log(0.1) * jnp.square(x / margin))


def observe(state: State) -> dict[str, Array]:
    """position [3] = (cart, cos, sin of the angle from upright), velocity [2]."""
    angle = state.position[1]
    return {
        "position": jnp.stack([state.position[0], jnp.cos(angle), jnp.sin(angle)]),
        "velocity": state.velocity.copy(),  # leaves that share a buffer cannot be donated
    }


def picture(state: State, size: int) -> Array:
    """What a camera in front of the rail sees, uint8 [size, size, 3]: rail, cart and pole, drawn thicker than
    they are; 4.4 m to a side."""
    points, pixel = raster.pixel_centres(size, 2.2), 4.4 / size
    cart, angle = jnp.stack([state.position[0], jnp.zeros(())]), state.position[1]
    tip = cart + LENGTH * jnp.stack([jnp.sin(angle), jnp.cos(angle)])
    image = jnp.full((size, size, 3), 30.0)
    image = raster.paint(image, raster.rectangle(points, jnp.zeros(2), (RAIL, 0.03)), (90, 90, 100), pixel)
    image = raster.paint(image, raster.rectangle(points, cart, (0.3, 0.2)), (60, 120, 220), pixel)
    image = raster.paint(image, raster.capsule(points, cart, tip, 0.12), (240, 170, 40), pixel)
    return raster.to_bytes(image)
