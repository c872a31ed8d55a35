"""TD-MPC2: a value and a policy prior for planning in a latent world model (arXiv 2310.16828).

Where the published code and paper differ, this follows the code, which made the published results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mbrl import losses, optimisers
from mbrl.distributions import SymlogTwoHot, check_bins, one_hot, symlog_two_hot, tanh_normal
from mbrl.errors import check_at_least, check_between
from mbrl.multitask import TASK, action_mask, discounts
from mbrl.networks import NormedMLP, apply
from mbrl.optimisers import OptimiserConfig
from mbrl.planning import simulator_of
from mbrl.types import Agent, Array, EnvSpec, Simulator, Trajectory, UpdateInfo, WorldModel

sg = jax.lax.stop_gradient


@dataclass(frozen=True)
class TDMPCConfig:
    """Value and policy learning; world model, planner and optimisers have their own fields."""

    units: int = 512
    """Width of the policy and of every critic, which have two hidden layers."""
    critics: int = 5
    """Critics in the ensemble (num_q), at least 2."""
    dropout: float = 0.01
    """Dropout after the first layer of the critics that learn."""
    bins: int = 101
    """Bins of the two-hot values, odd, uniform in symlog space."""
    bin_limit: float = 10.0
    """Outermost bin, as symlog of the value."""
    rho: float = 0.5
    """Weight of a step relative to the one before, along a predicted sequence (rho; the paper's lambda)."""
    scale_consistency: float = 20.0
    """Loss weight of predicting the next latent."""
    scale_reward: float = 0.1
    """Loss weight of the reward head."""
    scale_value: float = 0.1
    """Loss weight of the critics."""
    scale_termination: float = 1.0
    """Loss weight of the termination head, where the world model has one."""
    entropy: float = 1e-4
    """Weight of the policy's entropy (beta)."""
    scale_rate: float = 0.01
    """Rate at which the scale of the policy's values follows their range."""
    target_rate: float = 0.01
    """Rate of the target critics' moving average, every update (tau)."""
    optimiser: OptimiserConfig = field(
        default_factory=lambda: OptimiserConfig("adam", 3e-4, warmup=0, agc=0.0, clip_norm=20.0, eps=1e-8)
    )
    """Of world model and critics, as one."""
    actor_optimiser: OptimiserConfig = field(
        default_factory=lambda: OptimiserConfig("adam", 3e-4, warmup=0, agc=0.0, clip_norm=20.0, eps=1e-5)
    )
    """Of the policy."""

    VARIES: ClassVar[tuple[str, ...]] = (
        *("rho", "scale_consistency", "scale_reward", "scale_value", "scale_termination", "entropy"),
        *("scale_rate", "target_rate"),
    )


class TrainState(NamedTuple):
    """Everything that learns. params: {"model", "critic", "actor"}; target: the target critics' parameters;
    scale: what the policy loss divides values by; hyper: as in `mbrl.population`, or ()."""

    params: dict[str, Any]
    target: Any
    opt: Any
    actor_opt: Any
    scale: Array
    updates: Array
    hyper: Any = ()


class ActorState(NamedTuple):
    """Carried while acting, per environment: the model's state and the previous action."""

    state: Any
    action: Array


def check(config: TDMPCConfig) -> None:
    """UserError for impossible values."""
    check_at_least("agent.units", config.units, 1)
    check_at_least("agent.critics", config.critics, 2)
    scales = [f"scale_{k}" for k in ("consistency", "reward", "value", "termination")]
    for name in ("entropy", *scales):
        check_at_least(f"agent.{name}", getattr(config, name), 0)
    for name in ("rho", "scale_rate", "target_rate"):
        check_between(f"agent.{name}", getattr(config, name), 0, 1)
    check_between("agent.dropout", config.dropout, 0, 0.99)
    check_bins("agent", config.bins, config.bin_limit)


class Behaviour(NamedTuple):
    """Networks, and what they say. policy(params, features): a `OneHot` or `TanhNormal`. values(params
    [Q, ...], features, action, key): those of every critic [Q, ...], with dropout where there is a key."""

    actor: NormedMLP
    critic: NormedMLP
    policy: Callable[..., Any]
    values: Callable[..., SymlogTwoHot]


def behaviour(config: TDMPCConfig, spec: EnvSpec) -> Behaviour:
    """Policy and critics for the actions of ``spec``."""
    discrete, size = spec.action.classes is not None, spec.action.size
    actor = NormedMLP(2, config.units, size if discrete else 2 * size)
    critic = NormedMLP(2, config.units, config.bins, dropout=config.dropout, zero_out=True)

    def split(features):
        """The input of the networks, and the mask of actions that follows it for several tasks."""
        return (features[..., :-size], features[..., -size:]) if spec.tasks else (features, 1.0)

    def policy(params, features):
        inputs, mask = split(features)
        out = apply(actor, params, inputs)
        return one_hot(out) if discrete else tanh_normal(out, mask)

    def values(params, features, action, key=None):
        x = jnp.concatenate([split(features)[0], action.astype(features.dtype)], -1)
        if key is None:
            logits = jax.vmap(lambda p: apply(critic, p, x))(params)
        else:
            keys = jax.random.split(key, jax.tree.leaves(params)[0].shape[0])
            logits = jax.vmap(lambda p, k: apply(critic, p, x, k))(params, keys)
        return symlog_two_hot(logits, config.bin_limit)

    return Behaviour(actor, critic, policy, values)


def two_of(critics, key):
    """The parameters of two different critics, drawn at random from ``critics`` [Q, ...]."""
    count = jax.tree.leaves(critics)[0].shape[0]
    if count == 2:
        return critics
    index = jax.random.choice(key, count, (2,), replace=False)
    return jax.tree.map(lambda x: x[index], critics)


def make_simulator(config: TDMPCConfig, spec: EnvSpec, model: WorldModel, discount: Any) -> Simulator:
    """What a planner needs of TD-MPC2; its parameters are those of the agent. discount: as in `make`."""
    _, _, policy, values = behaviour(config, spec)

    def act(params, features, key):
        dist = policy(params["actor"], features)
        return dist.mode() if key is None else dist.sample(key)

    def value(params, features, key):
        """Mean of two critics at an action of the policy, and the spread of all of them."""
        pair_key, action_key = jax.random.split(key)
        action = act(params, features, action_key)
        mean = values(two_of(params["critic"], pair_key), features, action).mean().mean(0)
        return mean, {"value_std": spread(params, features, action)}

    def spread(params, features, action):
        """Standard deviation of the critics' values: how little their data says of this action."""
        return values(params["critic"], features, action).mean().std(0)

    masks = action_mask(spec)
    mask = (lambda params, state: jnp.asarray(masks)[state.now.task]) if spec.tasks else None
    simulator = simulator_of(model, act, value, mask, entry="model")

    def predict(params, state):
        """A plan ends where termination is the likelier outcome. Its actions may be penalised by the critics'
        spread, as in FOWM (arXiv 2310.16029)."""
        said = simulator.predict(params, state)
        source = model.features(params["model"], state._replace(z=state.source))
        doubt = {"value_std": spread(params, source, state.action)}
        cont = said.cont if spec.tasks else jnp.where(said.cont > 0.5 * discount, discount, 0.0)
        return said._replace(cont=cont, uncertainty=said.uncertainty | doubt)

    return simulator._replace(predict=predict)


def acting_params(config: TDMPCConfig, train: TrainState, mode: str) -> dict[str, Any]:
    """Parameters {"model", "critic", "actor"} that act, in both modes."""
    return train.params


def make(config: TDMPCConfig, spec: EnvSpec, model: WorldModel, discount: Any, total_updates: int) -> Agent:
    """TD-MPC2 on a world model that gives ``Observed.predicted``; it acts by its policy, until
    `mbrl.agents.planning` adds a planner.

    discount: per agent step, the one in the model's ``cont``; 0, for several tasks, takes what suits each.
    total_updates: length of the run, for the learning-rate schedule.
    """
    check(config)
    size = spec.action.size
    actor, critic, policy, values = behaviour(config, spec)
    groups = {rf"^model/{k}": v for k, v in model.param_groups().items()}
    optimiser = optimisers.make(config.optimiser, total_updates, groups)
    actor_optimiser = optimisers.make(config.actor_optimiser, total_updates)
    scales = {k: getattr(config, f"scale_{k}") for k in ("consistency", "reward", "termination")}
    gammas = discounts(spec, discount)

    def init(key) -> TrainState:
        model_key, critic_key, actor_key = jax.random.split(key, 3)
        params = {"model": model.init(model_key)}
        z = model.features(
            params["model"], model.starts(params["model"], model.init_state(params["model"], 1)).states
        )
        z = z[..., :-size] if spec.tasks else z  # without the mask
        inputs = jnp.concatenate([z, jnp.zeros((1, size), z.dtype)], -1)
        params["critic"] = jax.vmap(lambda k: critic.init(k, inputs)["params"])(
            jax.random.split(critic_key, config.critics)
        )
        params["actor"] = actor.init(actor_key, z)["params"]
        learned = {k: params[k] for k in ("model", "critic")}
        return TrainState(
            params=params,
            target=jax.tree.map(jnp.copy, params["critic"]),
            opt=optimiser.init(learned),
            actor_opt=actor_optimiser.init(params["actor"]),
            scale=jnp.ones(()),
            updates=jnp.zeros((), jnp.int32),
        )

    def init_actor(train: TrainState, batch: int) -> ActorState:
        return ActorState(model.init_state(train.params["model"], batch), jnp.zeros((batch, size)))

    def act(train: TrainState, actor_state: ActorState, obs, is_first, key, mode: str):
        params, (state_key, action_key) = train.params, jax.random.split(key)
        state = model.observe_step(
            params["model"], actor_state.state, actor_state.action, obs, is_first, state_key
        )
        now = model.starts(params["model"], state).states
        dist = policy(params["actor"], model.features(params["model"], now))
        action = dist.mode() if mode == "eval" else dist.sample(action_key)
        return action, ActorState(state, action), {"latent": ()}

    def targets(train: TrainState, features, traj: Trajectory, key):
        """TD targets of the transitions into ``traj`` [H, B], from the observed latents they arrive at: the
        smaller of two target critics (eq. 4)."""
        pair_key, action_key = jax.random.split(key)
        action = policy(train.params["actor"], features).sample(action_key)
        value = values(two_of(train.target, pair_key), features, action).mean().min(0)
        gamma = jnp.asarray(gammas)[traj.obs[TASK]] if spec.tasks else discount
        return losses.td_target(traj.reward, traj.is_terminal, value, gamma)

    def model_loss(learned, train: TrainState, traj: Trajectory, key):
        """World model and critics (eq. 3); transition t leads from row t to row t + 1."""
        observe_key, target_key, dropout_key = jax.random.split(key, 3)
        state = model.init_state(learned["model"], traj.reward.shape[1])
        seen = model.observe(learned["model"], state, traj, jax.random.split(observe_key, len(traj.reward)))
        age = losses.steps_since_start(traj.is_first)
        weight = losses.transition_weight(age, config.rho)[1:]
        arrived = jax.tree.map(lambda x: x[1:], traj)
        target = targets(train, sg(seen.features[1:]), arrived, target_key)
        value = values(learned["critic"], seen.predicted[:-1], arrived.action, dropout_key)
        # The first row has no transition. Termination is weighted equally at every step.
        means = {k: (x[1:] if k == "termination" else weight * x[1:]).mean() for k, x in seen.losses.items()}
        loss = sum(scales[name] * mean for name, mean in means.items())
        goals = jnp.broadcast_to(target, (config.critics, *target.shape))
        value_loss = (weight * value.loss(goals)).mean()
        loss = loss + config.scale_value * value_loss
        metrics = {f"{name}_loss": mean for name, mean in means.items()} | seen.metrics
        metrics |= losses.unlearned_terminals(means, traj.is_terminal)
        metrics |= {"value_loss": value_loss, "loss": loss, "target_value": target.mean()}
        return loss, (sg(seen.predicted), config.rho ** age.astype(jnp.float32), metrics)

    def action_values(critics, features, key):
        """Mean of two critics [Q, ...] at actions of the policy -> function of the policy's parameters, which
        returns (expected value, entropy), each [...]."""
        action_key, dropout_key = jax.random.split(key)

        def continuous(params):
            dist = policy(params, features)
            noise = jax.random.normal(action_key, dist.mean.shape)
            value = values(critics, features, dist.at(noise), dropout_key).mean().mean(0)
            # As published: of the normal before its tanh, and once more times the number of actions.
            count = dist.mask.sum(-1) if spec.tasks else size
            return value, -count * dist.inner_log_prob(noise)

        def over_all(params):
            dist = policy(params, features)
            repeated = jnp.broadcast_to(features, (size, *features.shape))
            choices = jnp.broadcast_to(
                jnp.eye(size)[:, *[None] * (features.ndim - 1)], (*repeated.shape[:-1], size)
            )
            value = values(critics, repeated, choices, dropout_key).mean().mean(0)
            return (jnp.moveaxis(value, 0, -1) * jnp.exp(dist.log_probs)).sum(-1), dist.entropy()

        return continuous if spec.action.classes is None else over_all

    def policy_loss(params, evaluate, weight, scale):
        """Maximum value and entropy along the predicted latents [H+1, B] (eq. 5)."""
        value, entropy = evaluate(params)
        scale = losses.update_scale(scale, value[0], config.scale_rate)
        loss = (weight * (-value / scale - config.entropy * entropy)).mean()
        metrics = {
            "actor_loss": loss,
            "entropy_actor": entropy.mean(),
            "value": value.mean(),
            "value_scale": scale,
        }
        return loss, (scale, metrics)

    def update(train: TrainState, traj: Trajectory, key) -> tuple[TrainState, UpdateInfo]:
        model_key, pair_key, policy_key = jax.random.split(key, 3)
        learned = {k: train.params[k] for k in ("model", "critic")}
        grads, (predicted, weight, metrics) = jax.grad(model_loss, has_aux=True)(
            learned, train, traj, model_key
        )
        updates, opt = optimiser.update(grads, train.opt, learned)
        learned: Any = optax.apply_updates(learned, updates)
        evaluate = action_values(two_of(learned["critic"], pair_key), predicted, policy_key)
        actor_grads, (scale, more) = jax.grad(policy_loss, has_aux=True)(
            train.params["actor"], evaluate, weight, train.scale
        )
        updates, actor_opt = actor_optimiser.update(actor_grads, train.actor_opt, train.params["actor"])
        params = learned | {"actor": optax.apply_updates(train.params["actor"], updates)}
        target = optax.incremental_update(learned["critic"], train.target, config.target_rate)
        metrics |= more | {
            "grad_norm": optax.tree.norm(grads),
            "actor_grad_norm": optax.tree.norm(actor_grads),
        }
        return TrainState(params, target, opt, actor_opt, scale, train.updates + 1), UpdateInfo(metrics)

    return Agent(init, init_actor, act, update)
