"""An environment of your own, written in JAX: pure functions of one environment; batches and seeds are added.

python examples/own_jax_environment.py
python experiments/dreamer_dmc.py --task examples.own_jax_environment:make --preset xs --steps 8000
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

import mbrl.envs
from mbrl.types import Array, ArraySpec, EnvSpec, JaxEnv, TimeStep


class State(NamedTuple):
    position: Array
    velocity: Array
    step: Array


def make(max_steps: int = 100) -> JaxEnv:
    """A cart on a rail is pushed to the middle: reward 1 there, less with the distance."""

    def show(state: State, reward) -> TimeStep:
        obs = {"position": state.position[None], "velocity": state.velocity[None]}
        return TimeStep(obs, reward, is_last=state.step >= max_steps, is_terminal=jnp.zeros((), bool))

    def reset(key):
        state = State(jax.random.uniform(key, (), minval=-1, maxval=1), jnp.zeros(()), jnp.int32(0))
        return state, show(state, jnp.zeros(()))

    def step(state: State, action, key):
        velocity = 0.95 * state.velocity + 0.05 * jnp.clip(action[0], -1, 1)
        state = State(state.position + velocity, velocity, state.step + 1)
        return state, show(state, jnp.exp(-4 * state.position**2))

    obs = {"position": ArraySpec((1,)), "velocity": ArraySpec((1,))}
    return JaxEnv(EnvSpec("cart", obs, ArraySpec((1,)), max_steps=max_steps), reset, step)


if __name__ == "__main__":
    mbrl.envs.check(make())
