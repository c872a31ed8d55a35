"""Tasks of gymnax (github.com/RobertTLange/gymnax, 1.0 or later), an optional dependency."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from mbrl.errors import UserError
from mbrl.types import Array, ArraySpec, EnvSpec, JaxEnv, TimeStep


def memory_chain(length: int = 20) -> JaxEnv:
    """MemoryChain-bsuite: a bit +-1 is shown at the start, and again after the first action; the action taken
    ``length`` steps later must name it for reward 1, else -1.

    state: (time remaining as a fraction of length; the query's index, 0 as there is one bit; the bit while
    shown and else 0). Actions [2], one-hot. Episodes have length + 1 steps. Best return 1, without memory 0.
    Raises ValueError for length < 1, UserError without gymnax.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, found {length}.")
    env, params = _load("memory_chain", "MemoryChain-bsuite")
    params = params.replace(memory_length=length, max_steps_in_episode=length + 2)
    spec = EnvSpec("memory_chain", {"state": ArraySpec((3,))}, ArraySpec((2,), classes=2), 1, length + 1)
    return adapt(env, params, spec)


def adapt(env: Any, params: Any, spec: EnvSpec) -> JaxEnv:
    """A gymnax environment with vector observations and discrete actions. Its ``step`` would reset at the end
    of an episode and lose the final observation, hence its parts are called."""

    def timestep(obs: Array, reward: Any, ends: Any, truncated: Any) -> TimeStep:
        terminal = jnp.asarray(ends, bool)
        seen = {"state": jnp.asarray(obs, jnp.float32)}
        return TimeStep(seen, jnp.asarray(reward, jnp.float32), terminal | truncated, terminal)

    def reset(key: Array) -> tuple[Any, TimeStep]:
        obs, state = env.reset_env(key, params)
        return state, timestep(obs, jnp.zeros(()), jnp.zeros((), bool), jnp.zeros((), bool))

    def step(state: Any, action: Array, key: Array) -> tuple[Any, TimeStep]:
        obs, state, reward, ends, _ = env.step_env(key, state, jnp.argmax(action), params)
        return state, timestep(obs, reward, ends, env.is_truncated(state, params))

    return JaxEnv(spec, reset, step)


def _load(task: str, name: str) -> tuple[Any, Any]:
    try:
        import gymnax  # type: ignore[import-not-found]
    except ImportError:
        raise UserError(
            f"--task {task} needs gymnax, which is not installed: pip install 'mbrl-jax[gymnax]'"
        ) from None
    return gymnax.make(name)
