"""One rollout for imagination, planning, Dyna branches and open-loop video."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mbrl.types import Array, Params, Simulator, Starts, State, WorldModel


def rollout(
    model: WorldModel | Simulator,
    params: Params,
    starts: Starts,
    policy: Callable[[Array, Array, Array], Array],
    key: Array,
    horizon: int,
) -> tuple[State, Array]:
    """Imagines ``horizon`` steps from every start.

    policy(features [..., F], key, t) -> action [..., A]. A closed loop uses the features; an open loop
    returns ``actions[t]``; a mixture does either by ``t``.
    Returns states [H+1, ...] without caches, the starts first, and actions [H, ..., A], action t leading to
    state t+1.
    """

    def body(state, inputs):
        t, key = inputs
        act_key, step_key = jax.random.split(key)
        action = policy(model.features(params, state), act_key, t)
        following = model.imagine_step(params, starts.ctx, state, action, step_key)
        return following, (model.emit(following), action)

    first = model.imagine_init(params, starts, horizon)
    inputs = jnp.arange(horizon), jax.random.split(key, horizon)
    _, (states, actions) = jax.lax.scan(body, first, inputs)
    states = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), model.emit(first), states)
    return states, actions
