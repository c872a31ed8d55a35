"""PETS: planning in an ensemble of probabilistic networks, without a policy or a value (arXiv 1805.12114)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mbrl import losses, optimisers
from mbrl.collect import random_action
from mbrl.errors import check_at_least
from mbrl.optimisers import OptimiserConfig
from mbrl.planning import simulator_of
from mbrl.types import Agent, Array, EnvSpec, Simulator, Trajectory, UpdateInfo, WorldModel


@dataclass(frozen=True)
class PETSConfig:
    """How the ensemble learns; world model and planner have their own fields."""

    scale_nll: float = 1.0
    """Loss weight of the members' negative log-likelihood, averaged over entries and summed over members."""
    scale_bounds: float = 0.005
    """Loss weight of the distance between the log-variance bounds. Published: 0.01, of a likelihood without
    its factor 1/2."""
    scale_reward: float = 1.0
    """Loss weight of the reward head."""
    scale_termination: float = 1.0
    """Loss weight of the termination head, where the world model has one."""
    optimiser: OptimiserConfig = field(
        default_factory=lambda: OptimiserConfig("adam", 1e-3, warmup=0, agc=0.0, clip_norm=100.0, eps=1e-8)
    )
    """Of the world model."""


class TrainState(NamedTuple):
    """Everything that learns. params: {"model"}; hyper: as in `mbrl.population`, or ()."""

    params: dict[str, Any]
    opt: Any
    updates: Array
    hyper: Any = ()


class ActorState(NamedTuple):
    """Carried while acting, per environment: the model's state and the previous action."""

    state: Any
    action: Array


def make_simulator(config: PETSConfig, spec: EnvSpec, model: WorldModel, discount: float) -> Simulator:
    """What a planner needs of PETS: the world model alone."""
    return simulator_of(model, entry="model")


def acting_params(config: PETSConfig, train: TrainState, mode: str) -> dict[str, Any]:
    """Parameters {"model"} that act, in both modes."""
    return train.params


def make(config: PETSConfig, spec: EnvSpec, model: WorldModel, discount: float, total_updates: int) -> Agent:
    """Learns a world model that needs no other losses than its own; it acts at random, until
    `mbrl.agents.planning` adds a planner.

    discount: unused, it is in the model's ``cont``. total_updates: length of the run, for the learning-rate
    schedule.
    """
    scales = {k: getattr(config, f"scale_{k}") for k in ("nll", "bounds", "reward", "termination")}
    for name, value in scales.items():
        check_at_least(f"agent.scale_{name}", value, 0)
    optimiser = optimisers.make(config.optimiser, total_updates, model.param_groups())

    def init(key) -> TrainState:
        params = model.init(key)
        return TrainState({"model": params}, optimiser.init(params), jnp.zeros((), jnp.int32))

    def init_actor(train: TrainState, batch: int) -> ActorState:
        action = jnp.zeros((batch, spec.action.size))
        return ActorState(model.init_state(train.params["model"], batch), action)

    def act(train: TrainState, actor_state: ActorState, obs, is_first, key, mode: str):
        params, (state_key, action_key) = train.params["model"], jax.random.split(key)
        state = model.observe_step(params, actor_state.state, actor_state.action, obs, is_first, state_key)
        action = random_action(action_key, spec, is_first.shape[0])
        return action, ActorState(state, action), {"latent": ()}

    def loss_of(params, traj: Trajectory, key):
        state = model.init_state(params, traj.reward.shape[1])
        seen = model.observe(params, state, traj, jax.random.split(key, len(traj.reward)))
        # The first row has no transition.
        means = {name: x[1:].mean() for name, x in seen.losses.items()}
        loss = sum(scales[name] * mean for name, mean in means.items())
        metrics = {f"{name}_loss": mean for name, mean in means.items()} | seen.metrics
        metrics |= losses.unlearned_terminals(means, traj.is_terminal)
        return loss, (seen.statistics, metrics | {"loss": loss})

    def update(train: TrainState, traj: Trajectory, key) -> tuple[TrainState, UpdateInfo]:
        before = train.params["model"]
        grads, (statistics, metrics) = jax.grad(loss_of, has_aux=True)(before, traj, key)
        updates, opt = optimiser.update(grads, train.opt, before)
        params: Any = optax.apply_updates(before, updates)
        params = params | {"statistics": statistics}
        metrics |= {"grad_norm": optax.tree.norm(grads)}
        return TrainState({"model": params}, opt, train.updates + 1), UpdateInfo(metrics)

    return Agent(init, init_actor, act, update)
