"""Probe environments: tiny tasks whose optimal return and value function are known exactly.

Each isolates one ability (after A. Jones, "Debugging RL, without the agonizing pain", 2021): an agent that
fails one of them has a definite fault. Conventions: ``reward`` is received on arrival, so the value of an
observation excludes the reward that came with it; ``g`` is the discount; a terminal observation has value 0.
All observations are {"state": float32 [F]}; sampled entries are drawn once, at reset.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbrl.types import Array, ArraySpec, EnvSpec, JaxEnv, TimeStep


class State(NamedTuple):
    """secret: what was drawn at reset. step: int32 [], agent steps so far."""

    secret: Any
    step: Array


def constant(length: int = 5, truncate: bool = False) -> JaxEnv:
    """One observation, reward 1 at every step, ``length`` steps, actions without effect. Tests the value.

    Optimal return: length (every policy). Value after t steps: (1 - g^(length - t)) / (1 - g); it depends on
    t, which only a model with memory knows. With ``truncate`` the episode is cut by a time limit instead of
    ending, hence the value is 1 / (1 - g) everywhere.
    """

    def show(secret: Array, step: Array, action: Array) -> Array:
        return jnp.ones(1)

    def reward(secret: Array, step: Array, action: Array) -> Array:
        return jnp.ones(())

    name = "probe_constant_truncated" if truncate else "probe_constant"
    return assemble(name, 1, ArraySpec((1,)), length, _nothing, show, reward, truncate)


def observation(length: int = 1) -> JaxEnv:
    """A bit b = +-1, shown throughout, is the reward of every step. Tests reward and value prediction.

    Optimal return: length * b, in expectation 0 (every policy). Value after t steps:
    b (1 - g^(length - t)) / (1 - g), which is b at the start for the default length 1.
    """

    def show(secret: Array, step: Array, action: Array) -> Array:
        return secret[None]

    def reward(secret: Array, step: Array, action: Array) -> Array:
        return secret

    return assemble("probe_observation", 1, ArraySpec((1,)), length, draw_bit, show, reward)


def delayed() -> JaxEnv:
    """A bit b = +-1 shown at reset only; the second and last step pays b. Tests discounting and memory.

    state: (b at reset and else 0, steps / 2). Optimal return: b, in expectation 0 (every policy).
    Value: g b at the start, b after one step.
    """

    def show(secret: Array, step: Array, action: Array) -> Array:
        return jnp.stack([jnp.where(step == 0, secret, 0), step / 2])

    def reward(secret: Array, step: Array, action: Array) -> Array:
        return jnp.where(step == 2, secret, 0)

    return assemble("probe_delayed", 2, ArraySpec((1,)), 2, draw_bit, show, reward)


def action(discrete: bool = False) -> JaxEnv:
    """One step whose reward depends on the action matching the observation. Tests the policy.

    Continuous: a target uniform in [-0.8, 0.8] is shown, reward 1 - |action - target| with the action clipped
    to [-1, 1]. Discrete: a bit +-1 is shown, reward 1 for the category 0 (bit -1) or 1 (bit +1), else 0.
    Optimal return: 1. Optimal value of the start: 1. The best constant action earns 0.6 (action 0), or 0.5.
    """

    def draw(key: Array) -> Array:
        return draw_bit(key) if discrete else jax.random.uniform(key, (), minval=-0.8, maxval=0.8)

    def show(secret: Array, step: Array, action: Array) -> Array:
        return secret[None]

    def reward(secret: Array, step: Array, action: Array) -> Array:
        if discrete:
            return matches(action, secret)
        return 1 - jnp.abs(jnp.clip(action[0], -1, 1) - secret)

    name = "probe_action_discrete" if discrete else "probe_action"
    return assemble(name, 1, _action(discrete), 1, draw, show, reward)


def memory(gap: int = 3, discrete: bool = False, name: str = "") -> JaxEnv:
    """A cue c = +-1 is shown at reset, then hidden for ``gap`` observations; the action taken on the last of
    these must match the cue for reward 1, else 0. Tests memory.

    state: (cue at reset and else 0, 1 when the answer is asked for and else 0). The episode has gap + 1
    steps. Matching: the sign of a continuous action, the category (c + 1) / 2 of a discrete one.
    Optimal return: 1; without memory 0.5. Optimal value after t steps: g^(gap - t). Raises ValueError for
    gap < 1.
    """
    if gap < 1:
        raise ValueError(f"gap must be at least 1, found {gap}.")

    def show(secret: Array, step: Array, action: Array) -> Array:
        return jnp.stack([jnp.where(step == 0, secret, 0), (step == gap).astype(jnp.float32)])

    def reward(secret: Array, step: Array, action: Array) -> Array:
        return jnp.where(step == gap + 1, matches(action, secret), 0)

    name = name or ("probe_memory_discrete" if discrete else "probe_memory")
    return assemble(name, 2, _action(discrete), gap + 1, draw_bit, show, reward)


constant_truncated = functools.partial(constant, truncate=True)
action_discrete = functools.partial(action, discrete=True)
memory_discrete = functools.partial(memory, discrete=True)


def assemble(
    name: str,
    features: int,
    action: ArraySpec,
    length: int,
    draw: Callable[[Array], Any],
    show: Callable[..., Array],
    reward: Callable[..., Array],
    truncate: bool = False,
) -> JaxEnv:
    """An environment of ``length`` steps that shows {"state": [features]} and draws everything at reset.

    draw(key) -> secret; show(secret, step, action [A]) -> state [features]; reward(secret, step, action)
    -> [], where ``step`` is that on arrival and ``action`` the one that led there, zeros at reset. Raises
    ValueError for length < 1.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, found {length}.")
    spec = EnvSpec(name, {"state": ArraySpec((features,))}, action, 1, length)

    def arrive(state: State, action: Array, value: Array) -> TimeStep:
        is_last = state.step >= length
        obs = {"state": show(state.secret, state.step, action).astype(jnp.float32)}
        return TimeStep(obs, value.astype(jnp.float32), is_last, jnp.logical_and(is_last, not truncate))

    def reset(key: Array) -> tuple[State, TimeStep]:
        state = State(draw(key), jnp.zeros((), jnp.int32))
        return state, arrive(state, jnp.zeros(spec.action.shape), jnp.zeros(()))

    def step(state: State, action: Array, key: Array) -> tuple[State, TimeStep]:
        del key  # everything is drawn at reset
        state = State(state.secret, state.step + 1)
        return state, arrive(state, action, reward(state.secret, state.step, action))

    return JaxEnv(spec, reset, step)


def _nothing(key: Array) -> Array:
    return jnp.zeros(())


def draw_bit(key: Array) -> Array:
    """+1.0 or -1.0 with equal probability."""
    return jnp.where(jax.random.bernoulli(key), 1.0, -1.0)


def _action(discrete: bool) -> ArraySpec:
    return ArraySpec((2,), classes=2) if discrete else ArraySpec((1,))


def matches(action: Array, bit: Array) -> Array:
    """1.0 when the action [1] (by its sign) or [2] (one-hot) says the bit +-1, else 0.0."""
    said_plus = action[0] > 0 if action.shape == (1,) else jnp.argmax(action) == 1
    return (said_plus == (bit > 0)).astype(jnp.float32)
