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

    def body(carry, inputs):
        state, kept = carry
        t, key = inputs
        act_key, step_key = jax.random.split(key)
        action = policy(model.features(params, state), act_key, t)
        state = model.imagine_step(params, starts.ctx, state, action, step_key)
        # Into one buffer with the starts: to prepend them afterwards would take the memory twice.
        kept = jax.tree.map(lambda xs, x: xs.at[t + 1].set(x), kept, model.emit(state))
        return (state, kept), action

    first = model.imagine_init(params, starts, horizon)
    kept = jax.tree.map(lambda x: jnp.zeros((horizon + 1, *x.shape), x.dtype).at[0].set(x), model.emit(first))
    inputs = jnp.arange(horizon), jax.random.split(key, horizon)
    (_, states), actions = jax.lax.scan(body, (first, kept), inputs)
    return states, actions
