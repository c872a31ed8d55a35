"""What a world model remembers: trained alone on random actions, then asked for the last reward of episodes.

Memory tasks (`mbrl.envs.memory`) pay with the last step, one of two rewards, which the first observation
decides. A model is right where its expected reward lies on the true one's side of their middle. In
**inference** it has seen the whole episode; in **imagination** only the first observations, and imagines the
rest with the actions that were taken (the measures of S4WM, arXiv 2307.02064).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mbrl import losses, optimisers
from mbrl.collect import random_action
from mbrl.errors import UserError, check_at_least
from mbrl.imagination import rollout
from mbrl.optimisers import OptimiserConfig
from mbrl.programs import EVALUATE, INIT, UPDATE, stream
from mbrl.types import Array, JaxEnv, Metrics, Params, Trajectory, Transition, WorldModel


@dataclass(frozen=True)
class ProbeConfig:
    """Training of the world model alone, on fresh whole episodes, and its examination."""

    updates: int = 600
    """Gradient steps."""
    batch_size: int = 32
    """Episodes per update (B)."""
    eval_every: int = 100
    """Updates between two examinations."""
    eval_episodes: int = 256
    """Fresh episodes per examination and seed."""
    observed: int = 5
    """Observations, the cue's included, before imagination goes on alone."""
    scale_rec: float = 1.0
    """Loss weight of reconstruction."""
    scale_reward: float = 1.0
    """Loss weight of the reward head."""
    scale_cont: float = 1.0
    """Loss weight of the continue head."""
    scale_dyn: float = 1.0
    """Loss weight of KL(sg(posterior) || prior)."""
    scale_rep: float = 0.1
    """Loss weight of KL(posterior || sg(prior))."""
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)


class ProbeState(NamedTuple):
    """What learns in a probe."""

    params: Params
    opt: Any


class Probe(NamedTuple):
    """Functions of one seed; ``key`` is the seed's own at every call.

    init(key) -> ProbeState
    learn(state, key, first) -> (state, metrics): ``eval_every`` updates, the first of them number ``first``
    examine(params, key) -> {"inference", "imagination", "chance"}: shares of episodes; chance is what the
        more frequent reward would score
    """

    init: Callable[[Array], ProbeState]
    learn: Callable[[ProbeState, Array, Array], tuple[ProbeState, Metrics]]
    examine: Callable[[Params, Array], Metrics]


def check(config: ProbeConfig, length: int) -> None:
    """UserError for impossible values; ``length`` is an episode's observations."""
    for name in ("updates", "batch_size", "eval_every", "eval_episodes", "observed"):
        check_at_least(f"probe.{name}", getattr(config, name), 1)
    for name in ("rec", "reward", "cont", "dyn", "rep"):
        check_at_least(f"probe.scale_{name}", getattr(config, f"scale_{name}"), 0)
    if config.updates % config.eval_every:
        raise UserError(
            f"probe.updates is {config.updates}, it must be a multiple of probe.eval_every, "
            f"which is {config.eval_every}"
        )
    if config.observed >= length:
        raise UserError(
            f"probe.observed is {config.observed}, it must be below the {length} observations of an episode"
        )


def episodes(env: JaxEnv, key: Array, batch: int) -> Trajectory:
    """``batch`` whole episodes under uniform random actions, [max_steps + 1, B]. Every episode of ``env``
    must last max_steps steps."""
    reset_key, key = jax.random.split(key)
    state, first = jax.vmap(env.reset)(jax.random.split(reset_key, batch))

    def body(state, key):
        action_key, step_key = jax.random.split(key)
        action = random_action(action_key, env.spec, batch)
        state, timestep = jax.vmap(env.step)(state, action, jax.random.split(step_key, batch))
        return state, (timestep, action)

    assert env.spec.max_steps is not None
    _, (steps, actions) = jax.lax.scan(body, state, jax.random.split(key, env.spec.max_steps))
    steps = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), first, steps)
    actions = jnp.pad(actions, [(1, 0), (0, 0), (0, 0)])
    is_first = jnp.zeros(steps.reward.shape, bool).at[0].set(True)
    return Transition(steps.obs, actions, steps.reward, is_first, steps.is_last, steps.is_terminal)


def make(config: ProbeConfig, env: JaxEnv, model: WorldModel) -> Probe:
    """The probe of ``model`` on ``env``. UserError for impossible values."""
    assert env.spec.max_steps is not None
    length = env.spec.max_steps + 1
    check(config, length)
    optimiser = optimisers.make(config.optimiser, config.updates, model.param_groups())
    scales = {name: getattr(config, f"scale_{name}") for name in ("rec", "reward", "cont", "dyn", "rep")}

    def observe(params, traj, key):
        state = model.init_state(params, traj.reward.shape[1])
        return model.observe(params, state, traj, jax.random.split(key, traj.reward.shape[0]))

    def loss(params, traj, key):
        means = {name: value.mean() for name, value in observe(params, traj, key).losses.items()}
        return losses.weighted(means, scales), {f"{name}_loss": value for name, value in means.items()}

    def init(key):
        params = model.init(stream(key, INIT, 0))
        return ProbeState(params, optimiser.init(params))

    def update(state: ProbeState, key):
        data_key, loss_key = jax.random.split(key)
        traj = episodes(env, data_key, config.batch_size)
        grads, metrics = jax.grad(loss, has_aux=True)(state.params, traj, loss_key)
        updates, opt = optimiser.update(grads, state.opt, state.params)
        metrics["grad_norm"] = optax.tree.norm(grads)
        return ProbeState(optax.apply_updates(state.params, updates), opt), metrics

    def learn(state, key, first):
        keys = jax.vmap(lambda i: stream(key, UPDATE, i))(first + jnp.arange(config.eval_every))
        state, metrics = jax.lax.scan(update, state, keys)
        return state, jax.tree.map(lambda x: x.mean(0), metrics)

    def imagined_end(params, traj, key):
        """The state that ends the episode, imagined with its actions from the last of the observed ones."""
        observe_key, imagine_key = jax.random.split(key)
        seen = observe(params, jax.tree.map(lambda x: x[: config.observed], traj), observe_key)
        starts, actions = model.starts(params, seen.state), traj.action[config.observed :]
        horizon = length - config.observed
        states, _ = rollout(model, params, starts, lambda f, k, t: actions[t], imagine_key, horizon)
        return states

    def examine(params, key):
        data_key, observe_key, imagine_key = jax.random.split(stream(key, EVALUATE, 0), 3)
        traj = episodes(env, data_key, config.eval_episodes)
        last = traj.reward[-1]
        middle = (last.max() + last.min()) / 2
        high = last > middle

        def accuracy(states):
            reward = model.predict(params, jax.tree.map(lambda x: x[-1], states)).reward
            return ((reward > middle) == high).mean()

        return {
            "inference": accuracy(observe(params, traj, observe_key).starts.states),
            "imagination": accuracy(imagined_end(params, traj, imagine_key)),
            "chance": jnp.maximum(high.mean(), 1 - high.mean()),
        }

    return Probe(init, learn, examine)
