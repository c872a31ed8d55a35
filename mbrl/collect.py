"""Collectors: agent and environments produce rows for replay. Episodes are reset here and nowhere else.

Both collectors produce the same rows: after a step with ``is_last`` the next row is the first of a new
episode (``is_first``, zero action, zero reward), so the final observation is stored and a reset counts as
one step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl.envs.pool import HostPool
from mbrl.envs.workers import WorkerPool
from mbrl.multitask import action_mask
from mbrl.types import Agent, Array, EnvSpec, JaxEnv, TimeStep, Transition


class EnvCarry(NamedTuple):
    """Where every environment of a seed stands, [E, ...]. env: state of JAX environments, () on the host;
    episode_return: sum of rewards so far; fresh: states and time steps to reset to where `JaxEnv` says that a
    reset is costly, else ()."""

    env: Any
    timestep: TimeStep
    is_first: Any
    action: Any
    episode_return: Any
    fresh: Any = ()


class Episodes(NamedTuple):
    """Episodes that ended in a stretch of steps: how many, and the sum of their returns."""

    count: Any
    returns: Any


def random_action(key: Array, spec: EnvSpec, batch: int) -> Array:
    """Uniform actions [batch, A]: in [-1, 1], 0 where the task of an environment has none; or one-hot."""
    size = spec.action.size
    if spec.action.classes is None:
        action = jax.random.uniform(key, (batch, size), minval=-1.0, maxval=1.0)
        return action * jnp.resize(action_mask(spec), action.shape) if spec.tasks else action
    return jax.nn.one_hot(jax.random.randint(key, (batch,), 0, size), size)


def make_row(carry: EnvCarry, latent) -> Transition:
    """The replay row of the current observations."""
    step = carry.timestep
    return Transition(
        step.obs, carry.action, step.reward, carry.is_first, step.is_last, step.is_terminal, latent
    )


def _finish(carry: EnvCarry, xp) -> Episodes:
    ended = carry.timestep.is_last
    return Episodes(ended.sum(-1), xp.where(ended, carry.episode_return, 0.0).sum(-1))


def init_device(env: JaxEnv, num_envs: int, key: Array) -> EnvCarry:
    """Freshly reset JAX environments of one seed."""
    count = num_envs * (1 + env.costly_reset)
    drawn = jax.vmap(env.reset)(jax.random.split(key, count))
    state, timestep = jax.tree.map(lambda x: x[:num_envs], drawn)
    return EnvCarry(
        state,
        timestep,
        jnp.ones(num_envs, bool),
        jnp.zeros((num_envs, env.spec.action.size)),
        jnp.zeros(num_envs),
        jax.tree.map(lambda x: x[num_envs:], drawn) if env.costly_reset else (),
    )


def renew(env: JaxEnv, carry: EnvCarry, key: Array, rows: int, iteration: Array) -> EnvCarry:
    """Draws the states to reset to anew in the iterations (of ``rows`` steps) in which the clock passes a
    multiple of an episode's length. Where no episode ends before its time limit, and an iteration is not
    longer than one, each is used once."""
    if not env.costly_reset:
        return carry
    length = (env.spec.max_steps or 1000) + 1  # a reset takes a row
    due = iteration * rows // length > (iteration - 1) * rows // length
    # The clock is the same for all seeds, so this stays a branch under vmap.
    draw = lambda: jax.vmap(env.reset)(jax.random.split(key, carry.is_first.shape[0]))
    return carry._replace(fresh=jax.lax.cond(due & (iteration > 0), draw, lambda: carry.fresh))


def collect_device(
    env: JaxEnv, agent: Agent, train, actor, carry: EnvCarry, key: Array, num_steps: int, explore: bool
):
    """Scans ``num_steps`` steps of one seed's environments inside a compiled program.

    explore: uniform random actions (prefill) instead of the agent's; the agent still observes.
    Returns (actor, carry, rows [num_steps, E, ...], Episodes).
    """
    num_envs = carry.is_first.shape[0]

    def one(state, action, reset_now, fresh, key):
        reset_key, step_key = jax.random.split(key)
        fresh, stepped = fresh or env.reset(reset_key), env.step(state, action, step_key)
        return jax.tree.map(lambda a, b: jnp.where(reset_now, a, b), fresh, stepped)

    def body(loop, key):
        actor, carry = loop
        act_key, random_key, env_key = jax.random.split(key, 3)
        mode = "watch" if explore else "train"
        action, actor, info = agent.act(train, actor, carry.timestep.obs, carry.is_first, act_key, mode=mode)
        if explore:
            action = random_action(random_key, env.spec, num_envs)
            actor = actor._replace(action=action)
        row, episodes, ended = make_row(carry, info["latent"]), _finish(carry, jnp), carry.timestep.is_last
        keys = jax.random.split(env_key, num_envs)
        state, timestep = jax.vmap(one)(carry.env, action, ended, carry.fresh, keys)
        carry = EnvCarry(
            state,
            timestep,
            ended,
            jnp.where(ended[:, None], 0.0, action),
            jnp.where(ended, 0.0, carry.episode_return) + timestep.reward,
            # Turned by one, so that an environment that soon ends again starts elsewhere.
            jax.tree.map(lambda x: jnp.roll(x, 1, 0), carry.fresh),
        )
        return (actor, carry), (row, episodes)

    (actor, carry), (rows, episodes) = jax.lax.scan(body, (actor, carry), jax.random.split(key, num_steps))
    return actor, carry, rows, jax.tree.map(lambda x: x.sum(0), episodes)


class HostCollector:
    """Steps S x E host environments with one batched policy call and one pool call per step.

    The last step of each stretch is left under way: its results are not needed before the next one, so they
    come while the device updates.
    """

    def __init__(self, pool: HostPool | WorkerPool, num_seeds: int, num_envs: int):
        self.pool, self.shape = pool, (num_seeds, num_envs)
        self._carry: EnvCarry | None = None
        self._action: np.ndarray | None = None  # of the step that is under way

    def _send(self, action: np.ndarray, reset: np.ndarray) -> None:
        self.pool.send(action.reshape(-1, action.shape[-1]), reset.reshape(-1))

    def _receive(self) -> TimeStep:
        return jax.tree.map(lambda x: x.reshape(*self.shape, *x.shape[1:]), self.pool.receive())

    def begin(self) -> EnvCarry:
        """Resets every environment."""
        zeros = np.zeros((*self.shape, self.pool.spec.action.size), np.float32)
        self._send(zeros, np.ones(self.shape, bool))
        timestep = self._receive()
        return EnvCarry((), timestep, np.ones(self.shape, bool), zeros, np.zeros(self.shape, np.float32))

    def _arrive(self) -> EnvCarry:
        """Where the environments stand, after the step that is under way."""
        if self._carry is None:
            self._carry = self.begin()
        if self._action is not None:
            ended, timestep = self._carry.timestep.is_last, self._receive()
            self._carry = EnvCarry(
                (),
                timestep,
                ended,
                np.where(ended[..., None], np.float32(0), self._action),
                np.where(ended, np.float32(0), self._carry.episode_return) + timestep.reward,
            )
            self._action = None
        return self._carry

    def collect(self, act, actor, num_steps: int):
        """``act(actor, obs, is_first, i) -> (action, actor, latent)`` is the compiled policy of step i.

        Returns (actor, rows, latents, Episodes): rows are numpy [S, num_steps, E, ...] without latents,
        which stay on the device, one entry per step.
        """
        rows, latents, episodes = [], [], []
        for i in range(num_steps):
            carry = self._arrive()
            action, actor, latent = act(actor, carry.timestep.obs, carry.is_first, i)
            rows.append(make_row(carry, ()))
            latents.append(latent)
            episodes.append(_finish(carry, np))
            self._action = np.array(action)
            self._send(self._action, carry.timestep.is_last)
        stacked = jax.tree.map(lambda *xs: np.stack(xs, 1), *rows)
        return actor, stacked, latents, jax.tree.map(lambda *xs: np.sum(xs, 0), *episodes)

    def get_state(self) -> dict[str, np.ndarray]:
        """Everything that the next step depends on, as arrays."""
        leaves = jax.tree.leaves(self._arrive())
        return {f"carry/{i}": x for i, x in enumerate(leaves)} | {
            f"pool/{k}": v for k, v in self.pool.get_state().items()
        }

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        # Not at once: the pool checks its environments at their first reset.
        tree = jax.tree.structure(self._arrive())
        self._carry = jax.tree.unflatten(tree, [state[f"carry/{i}"] for i in range(tree.num_leaves)])
        self.pool.set_state({k[5:]: v for k, v in state.items() if k.startswith("pool/")})
