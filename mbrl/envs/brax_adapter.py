"""Environments of brax and of MuJoCo Playground's port of the DM Control Suite, optional dependencies."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbrl.envs.adapters import contain, optional, typed
from mbrl.types import Array, ArraySpec, EnvSpec, JaxEnv, TimeStep

BACKENDS = ("generalized", "mjx", "positional", "spring")
EPISODE = 1000
"""Steps of an episode: that of brax's own training."""
NOT_OFFERED = ("fast",)
"""A stub for brax's own tests."""


class State(NamedTuple):
    """inner: the library's state; step: int32 [], steps of the episode so far."""

    inner: Any
    step: Array


def make(name: str) -> JaxEnv:
    """A task of brax, as ``ant``, or with its physics, as ``ant:spring``; without, the task's own choice.

    Raises ValueError for other tasks and physics, UserError without brax.
    """
    task, _, backend = name.partition(":")
    library = optional("brax.envs", f"brax:{name}", "brax")
    offered = [known for known in library._envs if known not in NOT_OFFERED]
    if task not in offered:
        raise ValueError(f"brax has no task {task!r} for us, it must be one of: {', '.join(offered)}")
    if ":" in name and backend not in BACKENDS:
        raise ValueError(f"brax has no physics {backend!r}, it must be one of: {', '.join(BACKENDS)}")
    try:
        env = library.get_environment(task, **({"backend": backend} if backend else {}))
    except ValueError as error:
        raise ValueError(
            f"brax cannot make {task!r} with {backend!r}: {' '.join(str(error).split())}"
        ) from None
    return adapt(env, f"brax:{name}", EPISODE)


def make_playground(name: str) -> JaxEnv:
    """A task of Playground's DM Control Suite by its name there, such as ``WalkerWalk``.

    MJX's implementation in JAX, where Playground itself would take Warp. Raises ValueError for other tasks,
    UserError without playground.
    """
    library = optional("mujoco_playground", f"playground:{name}", "playground").dm_control_suite
    if name not in library.ALL_ENVS:
        raise ValueError(f"playground has no task {name!r}, it must be one of: {', '.join(library.ALL_ENVS)}")
    length = library.get_default_config(name).episode_length
    try:
        env = library.load(name, config_overrides={"impl": "jax"})
    except AttributeError as error:  # playground 0.2 makes its reachers by a function that MuJoCo dropped
        raise ValueError(
            f"playground cannot make {name!r} with the MuJoCo that is installed: {error}"
        ) from None
    return adapt(env, f"playground:{name}", length)


def adapt(env: Any, name: str, length: int) -> JaxEnv:
    """An environment of brax's interface, without the wrappers that reset it and lose the final observation.

    state: the observation, float32 [F]. What the library calls done is terminal here; time runs out after
    ``length`` steps. A reset places all bodies, hence is costly.
    """
    # Old-style keys, since some environments keep theirs in a state that tests save as plain arrays.
    begin = lambda key: env.reset(jax.random.key_data(key))
    like = jax.eval_shape(begin, jax.random.key(0))
    spec = EnvSpec(name, {"state": ArraySpec(like.obs.shape)}, ArraySpec((env.action_size,)), 1, length)

    def reset(key: Array) -> tuple[State, TimeStep]:
        inner = typed(begin(key), like)
        no = jnp.zeros((), bool)
        first = TimeStep({"state": jnp.copy(inner.obs)}, jnp.zeros(()), no, jnp.copy(no))
        return State(inner, jnp.zeros((), jnp.int32)), first

    def step(state: State, action: Array, key: Array) -> tuple[State, TimeStep]:
        del key
        inner, count = typed(env.step(state.inner, jnp.clip(action, -1.0, 1.0)), like), state.step + 1
        terminal = inner.done > 0
        reward = inner.reward.astype(jnp.float32)
        after = TimeStep({"state": jnp.copy(inner.obs)}, reward, terminal | (count >= length), terminal)
        return State(inner, count), contain(after)

    return JaxEnv(spec, reset, step, costly_reset=True)
