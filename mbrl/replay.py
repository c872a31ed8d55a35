"""Sequence replay on the device: one ring per seed, all environments share the write head.

Storage is [capacity, E, ...]; row ``head`` is written next. A sequence is ``length`` consecutive rows of
one environment; it may contain episode starts (``is_first``), never the seam at the write head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbrl.types import Array, Trajectory, Transition


class ReplayState(NamedTuple):
    """data: a `Transition` with leaves [capacity, E, ...], but for images that lie elsewhere
    (`mbrl.host_replay`); inserted: rows ever written; served: sequences ever handed out by the online
    queue."""

    data: Transition
    inserted: Array
    served: Array


class Sampled(NamedTuple):
    """traj: [length, B, ...]; time: ring rows [length, B]; env: [B]; for writing latents back."""

    traj: Trajectory
    time: Array
    env: Array


class Replay(NamedTuple):
    """init(transition example [E, ...]) -> ReplayState
    add(state, rows [n, E, ...]) -> ReplayState; needs n <= capacity
    draw(inserted, served, key) -> (served, time [length, B], env [B]): where a sample lies, whatever is there
    sample(state, key, beside={}) -> (ReplayState, Sampled); needs at least ``length`` rows. beside:
        observations of the drawn rows [length, B, ...] that are not in ``state``
    write_latent(state, sampled, latent [T, B, ...]) -> ReplayState; into the last T rows of each sequence
    """

    init: Callable[[Transition], ReplayState]
    add: Callable[[ReplayState, Transition], ReplayState]
    draw: Callable[[Array, Array, Array], tuple[Array, Array, Array]]
    sample: Callable[..., tuple[ReplayState, Sampled]]
    write_latent: Callable[[ReplayState, Sampled, Any], ReplayState]


def make(capacity: int, num_envs: int, batch: int, length: int, online: bool = True) -> Replay:
    """Replay of ``capacity`` rows of ``num_envs`` environments, sampling ``batch`` sequences.

    online: every sequence of ``length`` fresh rows is served once before uniform ones are drawn (DreamerV3),
    so each step is trained on soon after it was seen.
    """
    if length > capacity:
        raise ValueError(f"replay: sequences of {length} rows do not fit into a capacity of {capacity} rows")

    def init(example: Transition) -> ReplayState:
        def zeros(x):
            return jnp.zeros((capacity, *jnp.shape(x)), jnp.asarray(x).dtype)

        return ReplayState(jax.tree.map(zeros, example), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def add(state: ReplayState, rows: Transition) -> ReplayState:
        n = rows.reward.shape[0]
        index = (state.inserted + jnp.arange(n)) % capacity
        data = jax.tree.map(lambda buffer, x: buffer.at[index].set(x), state.data, rows)
        return state._replace(data=data, inserted=state.inserted + n)

    def draw(inserted: Array, served: Array, key: Array) -> tuple[Array, Array, Array]:
        env_key, start_key = jax.random.split(key)
        oldest = jnp.maximum(0, inserted - capacity)
        env = jax.random.randint(env_key, (batch,), 0, num_envs)
        start = jax.random.randint(start_key, (batch,), oldest, inserted - length + 1)
        if online:
            # Fresh sequences are numbered chunk by chunk, environments within a chunk. Those that the ring
            # has already overwritten are skipped.
            first_kept = -(-oldest // length) * num_envs
            served = jnp.maximum(served, first_kept)
            number = served + jnp.arange(batch)
            available = (inserted // length) * num_envs
            fresh = number < available
            env = jnp.where(fresh, number % num_envs, env)
            start = jnp.where(fresh, number // num_envs * length, start)
            served = jnp.minimum(served + batch, jnp.maximum(available, served))
        return served, (start + jnp.arange(length)[:, None]) % capacity, env

    def sample(state: ReplayState, key: Array, beside: Mapping[str, Array] = MappingProxyType({})):
        served, time, env = draw(state.inserted, state.served, key)
        traj = jax.tree.map(lambda x: x[time, env], state.data)
        # An episode may have been abandoned without is_last: the next is_first says so.
        ended = jnp.concatenate([traj.is_first[1:], jnp.zeros_like(traj.is_first[:1])])
        traj = traj._replace(is_last=traj.is_last | ended, obs={**traj.obs, **beside})
        return state._replace(served=served), Sampled(traj, time, env)

    def write_latent(state: ReplayState, sampled: Sampled, latent) -> ReplayState:
        def write(buffer, x):
            time = sampled.time[-x.shape[0] :]
            return buffer.at[time, sampled.env].set(x.astype(buffer.dtype))

        return state._replace(data=state.data._replace(latent=jax.tree.map(write, state.data.latent, latent)))

    return Replay(init, add, draw, sample, write_latent)
