"""Tasks of gymnax (github.com/RobertTLange/gymnax, 1.0 or later), an optional dependency."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mbrl.envs.adapters import contain, in_range, optional, typed
from mbrl.types import Array, ArraySpec, EnvSpec, JaxEnv, TimeStep

NOT_OFFERED = ("MNISTBandit-bsuite",)
"""Tasks that download data when they are made."""


def make(name: str) -> JaxEnv:
    """A task by gymnax's name for it, such as ``CartPole-v1`` or ``Breakout-MinAtar``, with its own settings.

    state: the observation with its shape, float32, or int32 where it is a category. Actions one-hot, or in
    [-1, 1] for the task's own range. Raises ValueError for other names, UserError without gymnax.
    """
    library = optional("gymnax", f"gymnax:{name}", "gymnax")
    offered = [task for task in library.registered_envs if task not in NOT_OFFERED]
    if name not in offered:
        raise ValueError(f"gymnax has no task {name!r} for us, it must be one of: {', '.join(offered)}")
    env, params = library.make(name)
    seen, acted = env.observation_space(params), env.action_space(params)
    classes = getattr(seen, "n", None)
    shown = ArraySpec(tuple(seen.shape), "int32" if classes else "float32", classes)
    count = getattr(acted, "n", None)
    action = ArraySpec((count,), classes=count) if count else ArraySpec(tuple(acted.shape))
    spec = EnvSpec(f"gymnax:{name}", {"state": shown}, action, 1, int(params.max_steps_in_episode))
    return adapt(env, params, spec)


def memory_chain(length: int = 20) -> JaxEnv:
    """MemoryChain-bsuite: a bit +-1 is shown at the start, and again after the first action; the action taken
    ``length`` steps later must name it for reward 1, else -1.

    state: (time remaining as a fraction of length; the query's index, 0 as there is one bit; the bit while
    shown and else 0). Actions [2], one-hot. Episodes have length + 1 steps. Best return 1, without memory 0.
    Raises ValueError for length < 1, UserError without gymnax.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, found {length}.")
    env, params = optional("gymnax", "memory_chain", "gymnax").make("MemoryChain-bsuite")
    params = params.replace(memory_length=length, max_steps_in_episode=length + 2)
    spec = EnvSpec("memory_chain", {"state": ArraySpec((3,))}, ArraySpec((2,), classes=2), 1, length + 1)
    return adapt(env, params, spec)


def adapt(env: Any, params: Any, spec: EnvSpec) -> JaxEnv:
    """A gymnax environment with one array as observation. Its ``step`` would reset at the end of an episode
    and lose the final observation, hence its parts are called."""
    space = env.action_space(params)
    discrete, kind = spec.action.classes, spec.obs["state"].dtype
    like = jax.eval_shape(lambda key: env.reset_env(key, params)[1], jax.random.key(0))

    def timestep(obs: Array, reward: Any, ends: Any, truncated: Any) -> TimeStep:
        terminal = jnp.asarray(ends, bool)
        seen = {"state": jnp.array(obs, kind)}
        return contain(TimeStep(seen, jnp.asarray(reward, jnp.float32), terminal | truncated, terminal))

    def reset(key: Array) -> tuple[Any, TimeStep]:
        obs, state = env.reset_env(key, params)
        return typed(state, like), timestep(obs, jnp.zeros(()), jnp.zeros((), bool), jnp.zeros((), bool))

    def step(state: Any, action: Array, key: Array) -> tuple[Any, TimeStep]:
        chosen = jnp.argmax(action) if discrete else in_range(action, space.low, space.high)
        obs, state, reward, ends, _ = env.step_env(key, state, chosen, params)
        return typed(state, like), timestep(obs, reward, ends, env.is_truncated(state, params))

    return JaxEnv(spec, reset, step)
