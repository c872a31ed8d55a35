"""Dreamer: an actor-critic that learns in the imagination of a world model (arXiv 2301.04104)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mbrl import losses, optimisers
from mbrl.distributions import BoundedNormal, OneHot, TwoHot, bounded_normal, check_bins, one_hot, two_hot
from mbrl.errors import UserError, check_at_least, check_between
from mbrl.imagination import rollout
from mbrl.networks import MAX_LAYERS, MLP, Linear, apply
from mbrl.optimisers import OptimiserConfig
from mbrl.planning import simulator_of
from mbrl.types import Agent, Array, EnvSpec, Simulator, Starts, Trajectory, UpdateInfo, WorldModel

sg = jax.lax.stop_gradient


@dataclass(frozen=True)
class DreamerConfig:
    """Behaviour learning; the world model and the optimiser have their own fields."""

    actor_layers: int = 3
    """Layers of the policy network."""
    critic_layers: int = 3
    """Layers of the value network."""
    units: int = 1024
    """Width of policy and value networks."""
    actor_grad: Literal["reinforce", "dynamics"] = "reinforce"
    """Policy gradient estimator. reinforce: score function (published). dynamics: through the world model;
    continuous actions only."""
    horizon: int = 15
    """Imagined agent steps (H)."""
    imag_last: int = 0
    """Imagine from the last K steps of each sequence; 0 from all T."""
    imag_starts: int = 0
    """Imagine from this many starts drawn at random per update; 0, or more than there are, from all."""
    lam: float = 0.95
    """Mixing weight of the lambda-return (lambda)."""
    min_std: float = 0.1
    """Smallest standard deviation of continuous actions, which lie in [-1, 1]; the largest is 1."""
    noise_correlation: float = 0.0
    """Correlation of the policy's noise from one step to the next while exploring continuous actions (0 is
    white noise, published). Noise that lasts moves a body further; its distribution at a step is the same."""
    entropy: float = 3e-4
    """Weight of the policy's entropy (eta)."""
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
    scale_replay_value: float = 0.3
    """Loss weight of the critic on replayed states."""
    replay_bootstrap: Literal["imagined", "value"] = "imagined"
    """What replayed returns bootstrap from: the imagined return of the same state (published; needs
    imag_starts=0), or the critic."""
    slow_rate: float = 0.02
    """Rate of the slow critic's moving average, every update."""
    slow_scale: float = 1.0
    """Weight of the critic's regularisation towards the slow critic."""
    return_rate: float = 0.01
    """Rate of the return percentiles' moving average."""
    bins: int = 255
    """Bins of the two-hot value, odd."""
    bin_limit: float = 20.0
    """Outermost bin, as symlog of the return."""
    replay_context: bool = True
    """Start training sequences from the latent stored at acting time (else from zeros)."""
    actor_average: float = 0.0
    """Decay of a moving average of the policy's parameters that acts in evaluation; 0 is off."""
    actor_lr_scale: float = 1.0
    """Learning rate of the policy as a multiple of the optimiser's."""
    critic_lr_scale: float = 1.0
    """Learning rate of the critic as a multiple of the optimiser's."""
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)

    VARIES: ClassVar[tuple[str, ...]] = (
        *("lam", "noise_correlation", "entropy", "scale_rec", "scale_reward", "scale_cont", "scale_dyn"),
        *("scale_rep", "scale_replay_value", "slow_rate", "slow_scale", "return_rate"),
        *("actor_lr_scale", "critic_lr_scale"),
    )


class TrainState(NamedTuple):
    """Everything that learns. params: {"model", "actor", "critic"}; slow: the slow critic's parameters;
    actor_average: averaged policy parameters, or () when off; hyper: numbers in which members of a population
    differ (`mbrl.population`), or () where they do not."""

    params: dict[str, Any]
    slow: Any
    actor_average: Any
    opt: Any
    return_norm: losses.ReturnNorm
    updates: Array
    hyper: Any = ()


class ActorState(NamedTuple):
    """Carried while acting, per environment: the latent state, the previous action and its noise."""

    state: Any
    action: Array
    noise: Array


class Policy(nn.Module):
    """MLP, then logits [..., A] of discrete actions, or mean and std outputs [..., 2A] of continuous ones:
    two layers, because adaptive clipping works per tensor."""

    layers: int
    units: int
    size: int
    discrete: bool

    @nn.compact
    def __call__(self, features: Array) -> Array:
        x = MLP(self.layers, self.units, name="mlp")(features)
        names = ["logits"] if self.discrete else ["mean", "std"]
        return jnp.concatenate([Linear(self.size, 0.01, name=name)(x) for name in names], -1)


def check(config: DreamerConfig, spec: EnvSpec) -> None:
    """UserError for impossible values and combinations."""
    check_at_least("agent.units", config.units, 1)
    for name in ("actor_layers", "critic_layers"):
        check_between(f"agent.{name}", getattr(config, name), 1, MAX_LAYERS)
    check_between("agent.horizon", config.horizon, 1, 10_000)
    for name in ("imag_last", "imag_starts", "entropy", "slow_scale", "scale_replay_value"):
        check_at_least(f"agent.{name}", getattr(config, name), 0)
    for name in ("lam", "min_std", "noise_correlation", "slow_rate", "return_rate", "actor_average"):
        check_between(f"agent.{name}", getattr(config, name), 0, 1)
    check_bins("agent", config.bins, config.bin_limit)
    if config.imag_last == 1:
        raise UserError("agent.imag_last is 1, it must be 0 or at least 2: replayed returns need a next step")
    if config.actor_grad == "dynamics" and spec.action.classes is not None:
        raise UserError(f"agent.actor_grad is dynamics, but {spec.name} has discrete actions: use reinforce")
    if config.replay_bootstrap == "imagined" and config.imag_starts:
        raise UserError(
            f"agent.replay_bootstrap is imagined, which needs a return of every replayed state, but "
            f"agent.imag_starts is {config.imag_starts}: set it to 0, or agent.replay_bootstrap to value"
        )


class Behaviour(NamedTuple):
    """Networks, and what they say: policy(params, features) and value(params, features) are distributions."""

    actor: nn.Module
    critic: nn.Module
    policy: Callable[..., OneHot | BoundedNormal]
    value: Callable[..., TwoHot]


def behaviour(config: DreamerConfig, spec: EnvSpec) -> Behaviour:
    """Actor and critic for the actions of ``spec``."""
    discrete = spec.action.classes is not None
    actor = Policy(config.actor_layers, config.units, spec.action.size, discrete)
    critic = MLP(config.critic_layers, config.units, config.bins, outscale=0.0)

    def policy(params, features):
        out = apply(actor, params, features)
        return one_hot(out) if discrete else bounded_normal(out, config.min_std)

    def value(params, features):
        return two_hot(apply(critic, params, features), config.bin_limit)

    return Behaviour(actor, critic, policy, value)


def make_simulator(config: DreamerConfig, spec: EnvSpec, model: WorldModel, discount: Any) -> Simulator:
    """What a planner needs of Dreamer; its parameters are those of `acting_params`. discount: not needed, as
    the model's ``cont`` holds it."""
    _, _, policy, value = behaviour(config, spec)

    def act(params, features, key):
        dist = policy(params["actor"], features)
        return dist.mode() if key is None else dist.sample(key)

    def critic(params, features, key):
        return value(params["critic"], features).mean()

    return simulator_of(model, act, critic, entry="model")


def acting_params(config: DreamerConfig, train: TrainState, mode: str) -> dict[str, Any]:
    """Parameters {"model", "actor", "critic"} that act in a mode."""
    averaged = mode == "eval" and config.actor_average
    return train.params | {"actor": train.actor_average} if averaged else train.params


def make(config: DreamerConfig, spec: EnvSpec, model: WorldModel, discount: Any, total_updates: int) -> Agent:
    """Dreamer on any world model.

    discount: per agent step, the one that the model's continue head learns. total_updates: length of the
    run, for the learning-rate schedule.
    """
    check(config, spec)
    if config.replay_context and not model.storable:
        raise UserError(
            "agent.replay_context is True, but this world model's memory is too large to store with every "
            "step: set it to False, and loop.batch_length to the context that training should see"
        )
    discrete = spec.action.classes is not None
    size = spec.action.size
    actor, critic, policy, value = behaviour(config, spec)
    groups = {rf"^model/{k}": v for k, v in model.param_groups().items()}
    groups |= {
        "^actor/": {"lr_scale": config.actor_lr_scale},
        "^critic/": {"lr_scale": config.critic_lr_scale},
    }
    optimiser = optimisers.make(config.optimiser, total_updates, groups)
    scales = {k: getattr(config, f"scale_{k}") for k in ("rec", "reward", "cont", "dyn", "rep")}

    def init(key) -> TrainState:
        model_key, actor_key, critic_key = jax.random.split(key, 3)
        params = {"model": model.init(model_key)}
        features = model.features(params["model"], model.init_state(params["model"], 1))
        params["actor"] = actor.init(actor_key, features)["params"]
        params["critic"] = critic.init(critic_key, features)["params"]
        copy = lambda tree: jax.tree.map(jnp.copy, tree)
        return TrainState(
            params=params,
            slow=copy(params["critic"]),
            actor_average=copy(params["actor"]) if config.actor_average else (),
            opt=optimiser.init(params),
            # Two arrays: leaves of a donated state must not share a buffer.
            return_norm=losses.ReturnNorm(jnp.zeros(()), jnp.zeros(())),
            updates=jnp.zeros((), jnp.int32),
        )

    def init_actor(train: TrainState, batch: int) -> ActorState:
        state = model.init_state(train.params["model"], batch)
        return ActorState(state, jnp.zeros((batch, size)), jnp.zeros((batch, size)))

    def explore(dist, noise, is_first, key):
        """An action, and the noise in it: autoregressive, standard normal at every step."""
        if discrete:
            return dist.sample(key), noise
        rho, fresh = config.noise_correlation, jax.random.normal(key, noise.shape)
        noise = jnp.where(is_first[:, None], fresh, rho * noise + (1 - rho**2) ** 0.5 * fresh)
        return dist.at(noise), noise

    def act(train: TrainState, actor_state: ActorState, obs, is_first, key, mode: str):
        state_key, action_key = jax.random.split(key)
        state = model.observe_step(
            train.params["model"], actor_state.state, actor_state.action, obs, is_first, state_key
        )
        features = model.features(train.params["model"], state)
        dist = policy(acting_params(config, train, mode)["actor"], features)
        noise = jnp.where(is_first[:, None], 0.0, actor_state.noise)
        if mode == "eval":
            action = dist.mode()
        else:
            action, noise = explore(dist, noise, is_first, action_key)
        info = {"latent": state if config.replay_context else ()}
        info |= {} if discrete else {"noise": action - dist.mode()}
        return action, ActorState(state, action, noise), info

    def select_starts(starts: Starts, key) -> Starts:
        """Posterior states [T, B] -> starts: the last K of each sequence [K, B], or a random subset [N]."""
        states = jax.tree.map(lambda x: sg(x[-config.imag_last :]), starts.states)
        total = int(np.prod(jax.tree.leaves(states)[0].shape[:2]))
        if 0 < config.imag_starts < total:
            states = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), states)
            index = jax.random.choice(key, total, (config.imag_starts,), replace=False)
            states = jax.tree.map(lambda x: x[index], states)
        return Starts(sg(starts.ctx), states)

    def imagine(params, starts: Starts, key):
        """States [H+1, ...] and actions [H, ..., A] from starts [...]; differentiable only where the actor's
        gradient needs it."""
        frozen = sg(params["model"])
        behave = params["actor"] if config.actor_grad == "dynamics" else sg(params["actor"])

        def choose(features, key, t):
            return policy(behave, sg(features)).sample(key)

        states, actions = rollout(model, frozen, starts, choose, key, config.horizon)
        if config.actor_grad == "reinforce":
            states, actions = sg((states, actions))
        return frozen, states, actions

    def behaviour_losses(params, train: TrainState, starts: Starts, key):
        """Actor and critic losses in imagination, and the imagined return of each start [...]."""
        frozen, states, actions = imagine(params, starts, key)
        features = model.features(frozen, states)
        prediction = model.predict(frozen, states)
        current = value(params["critic"], sg(features))
        if config.actor_grad == "dynamics":
            baseline = value(sg(params["critic"]), features).mean()
        else:
            baseline = sg(current.mean())
        returns = losses.lambda_return(prediction.reward, prediction.cont, baseline, config.lam)
        norm = losses.update_return_norm(train.return_norm, returns, config.return_rate)
        weight = losses.trajectory_weight(prediction.cont)[:-1]
        dist = policy(params["actor"], sg(features)[:-1])
        entropy = dist.entropy()
        if config.actor_grad == "dynamics":
            actor_loss = losses.pathwise_loss(returns / norm.scale, entropy, weight, config.entropy)
        else:
            advantage = (returns - baseline[:-1]) / norm.scale
            log_prob = dist.log_prob(sg(actions))
            actor_loss = losses.reinforce_loss(log_prob, advantage, entropy, weight, config.entropy)
        slow = value(train.slow, sg(features)).mean()
        kept = type(current)(current.logits[:-1], current.bins)
        critic_loss = losses.critic_loss(kept, sg(returns), sg(slow[:-1]), weight, config.slow_scale)
        metrics = {
            "actor_loss": actor_loss.mean(),
            "critic_loss": critic_loss.mean(),
            "entropy_actor": entropy.mean(),
            "imagined_return": returns.mean(),
            "imagined_reward": prediction.reward[1:].mean(),
            "return_scale": norm.scale,
        }
        return actor_loss.mean() + critic_loss.mean(), norm, returns[0], metrics

    def replay_value_loss(params, train: TrainState, traj: Trajectory, features, start_returns):
        """Critic on replayed states; its gradient reaches the world model through ``features``."""
        last = lambda x: x[-config.imag_last :]
        features, traj = last(features), jax.tree.map(last, traj)
        current = value(params["critic"], features)
        if config.replay_bootstrap == "imagined":
            bootstrap = start_returns.reshape(traj.reward.shape)
        else:
            bootstrap = current.mean()
        returns = losses.replay_returns(
            traj.reward, traj.is_last, traj.is_terminal, sg(bootstrap), discount, config.lam
        )
        slow = value(train.slow, sg(features)).mean()
        kept = type(current)(current.logits[:-1], current.bins)
        weight = 1.0 - traj.is_last[:-1].astype(jnp.float32)
        return losses.critic_loss(kept, returns, sg(slow[:-1]), weight, config.slow_scale).mean()

    def total_loss(params, train: TrainState, traj: Trajectory, key):
        observe_key, start_key, imagine_key = jax.random.split(key, 3)
        state = model.init_state(params["model"], traj.reward.shape[1])
        if config.replay_context:
            # The first row only supplies the carry: it was trained on where it is not the first.
            state = jax.tree.map(lambda x: x[0], traj.latent)
            traj = jax.tree.map(lambda x: x[1:], traj)
        keys = jax.random.split(observe_key, traj.reward.shape[0])
        seen = model.observe(params["model"], state, traj, keys)
        means = {name: loss.mean() for name, loss in seen.losses.items()}
        loss = losses.weighted(means, scales)
        behaviour, norm, start_returns, metrics = behaviour_losses(
            params, train, select_starts(seen.starts, start_key), imagine_key
        )
        replay_value = replay_value_loss(params, train, traj, seen.features, start_returns)
        loss = loss + behaviour + config.scale_replay_value * replay_value
        metrics |= {f"{name}_loss": mean for name, mean in means.items()} | seen.metrics
        metrics |= {"replay_value_loss": replay_value, "loss": loss}
        latent = seen.starts.states if config.replay_context else ()
        return loss, (norm, metrics, latent)

    def update(train: TrainState, traj: Trajectory, key) -> tuple[TrainState, UpdateInfo]:
        gradient = jax.grad(total_loss, has_aux=True)
        grads, (norm, metrics, latent) = gradient(train.params, train, traj, key)
        updates, opt = optimiser.update(grads, train.opt, train.params)
        params: Any = optax.apply_updates(train.params, updates)
        slow = optax.incremental_update(params["critic"], train.slow, config.slow_rate)
        average = train.actor_average
        if config.actor_average:
            average = optax.incremental_update(params["actor"], average, 1 - config.actor_average)
        metrics["grad_norm"] = optax.tree.norm(grads)
        new = TrainState(params, slow, average, opt, norm, train.updates + 1)
        return new, UpdateInfo(metrics, latent)

    return Agent(init, init_actor, act, update)
