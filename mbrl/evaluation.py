"""Deterministic evaluation of all seeds at once: fixed start states, the policy's mode, no learning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mbrl.envs.pool import HostPool
from mbrl.envs.workers import WorkerPool
from mbrl.processes import agree
from mbrl.seeds import Seeds
from mbrl.types import Agent, JaxEnv, TimeStep, Trajectory

MAX_STEPS = 1000
"""Agent steps after which the evaluation of an environment without a time limit ends."""


def make_device(
    agent: Agent, env: JaxEnv, seeds: Seeds, episodes: int, record: bool = False
) -> Callable[..., Any]:
    """``evaluate(train, keys) -> returns [S, episodes]``; one program, ``episodes`` environments per seed.

    record: return (returns, Trajectory [S, T, episodes]) instead, the final observation included; what
    follows the first ``is_last`` of a column is no part of the evaluation.
    """
    program = device_program(agent, env, seeds, episodes, record)
    return lambda train, keys: seeds.fetch(program(train, keys))


def device_program(
    agent: Agent, env: JaxEnv, seeds: Seeds, episodes: int, record: bool = False
) -> Callable[..., Any]:
    """What `make_device` runs; its results stay on the device."""
    max_steps = env.spec.max_steps or MAX_STEPS

    def one_seed(train, key):
        reset_key, loop_key = jax.random.split(key)
        state, timestep = jax.vmap(env.reset)(jax.random.split(reset_key, episodes))
        actor = agent.init_actor(train, episodes)

        def body(carry, key):
            state, timestep, actor, first, done, returns = carry
            row = _row(timestep, actor.action, first, jnp) if record else ()
            act_key, step_key = jax.random.split(key)
            action, actor, _ = agent.act(train, actor, timestep.obs, first, act_key, mode="eval")
            state, timestep = jax.vmap(env.step)(state, action, jax.random.split(step_key, episodes))
            returns = returns + jnp.where(done, 0.0, timestep.reward)
            done = done | timestep.is_last
            return (state, timestep, actor, jnp.zeros_like(first), done, returns), row

        carry = (
            state,
            timestep,
            actor,
            jnp.ones(episodes, bool),
            jnp.zeros(episodes, bool),
            jnp.zeros(episodes),
        )
        carry, rows = jax.lax.scan(body, carry, jax.random.split(loop_key, max_steps))
        if not record:
            return carry[-1]
        _, timestep, actor, first, _, returns = carry
        last = _row(timestep, actor.action, first, jnp)  # rows are taken before they are acted on
        return returns, jax.tree.map(lambda xs, x: jnp.concatenate([xs, x[None]]), rows, last)

    return seeds.program(one_seed)


def _row(timestep: TimeStep, action: Any, first: Any, xp: Any) -> Trajectory:
    """An observed step and the action that led to it; ``xp`` is jax.numpy or numpy."""
    obs, reward, is_last, is_terminal = timestep
    return Trajectory(obs, xp.where(first[..., None], 0.0, action), reward, first, is_last, is_terminal)


def make_host(
    agent: Agent, pool: HostPool | WorkerPool, seeds: Seeds, episodes: int, record: bool = False
) -> Callable[..., Any]:
    """As `make_device`, for ``pool`` of S x episodes host environments, seed by seed, of the seeds in this
    process."""
    start = pool.get_state()
    shape = (len(seeds.own), episodes)

    def act(train, actor, obs, is_first, key, step):
        action, actor, _ = agent.act(train, actor, obs, is_first, jax.random.fold_in(key, step), mode="eval")
        return action, actor

    program = seeds.program(act, shared=(5,))
    init_actor = seeds.program(lambda train: agent.init_actor(train, episodes))

    def evaluate(train, keys, watch: Callable[[], None] | None = None):
        """watch: called after every step until the first environment's episode ends, to render it."""
        pool.set_state(start)  # the same start states at every evaluation
        batch = lambda x: x.reshape(*shape, *x.shape[1:])
        actor, first = init_actor(train), np.ones(shape, bool)
        action = np.zeros((*shape, pool.spec.action.size), np.float32)
        timestep = jax.tree.map(batch, pool.step(action.reshape(-1, action.shape[-1]), first.reshape(-1)))
        returns, done, step = np.zeros(shape), np.zeros(shape, bool), 0
        rows = [_row(timestep, action, first, np)]
        limit = pool.spec.max_steps or MAX_STEPS
        while agree(not done.all()) and step < limit:
            action, actor = program(train, actor, *seeds.put((timestep.obs, first)), keys, step)
            action = seeds.fetch_own(action)
            flat = action.reshape(-1, action.shape[-1])
            # An episode that is over is reset and goes on uncounted, so that the batch keeps its shape.
            first = timestep.is_last
            timestep = jax.tree.map(batch, pool.step(flat, first.reshape(-1)))
            if watch is not None and not done[0, 0]:
                watch()
            returns += np.where(done, 0.0, timestep.reward)
            done |= timestep.is_last
            step += 1
            if record:
                rows.append(_row(timestep, action, first, np))
        trajectory = jax.tree.map(lambda *xs: np.stack(xs, 1), *rows) if record else None
        return seeds.fetch((returns, trajectory) if record else returns)

    return evaluate
