"""PETS' world model: an ensemble of Gaussian networks that predict how the observation changes
(arXiv 1805.12114, section 4; elites as in MBPO, arXiv 1906.08253)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl.distributions import Bernoulli, SymlogMSE, one_hot
from mbrl.errors import UserError, check_at_least, check_between
from mbrl.images import split_obs
from mbrl.losses import episode_discount, gaussian_nll, soft_bounds
from mbrl.networks import MAX_LAYERS, MLP, apply, flatten_obs, symlog
from mbrl.recurrence import clear, previous
from mbrl.types import Array, EnvSpec, Observed, Prediction, Starts, Trajectory, WorldModel

sg = jax.lax.stop_gradient
FIRST_BOUNDS = -10.0, 0.5  # of the log-variance, before they are learned
FARTHEST = 100.0  # normalised inputs beyond are clipped: a plan may leave the data, numbers stay finite
POISSON = np.cumsum([np.exp(-1) / float(np.prod(range(1, k + 1))) for k in range(8)]).astype(np.float32)


@dataclass(frozen=True)
class EnsembleConfig:
    """PETS' ensemble, which learns the reward too."""

    members: int = 5
    """Networks in the ensemble (B), each with its own bootstrap of the data."""
    elites: int = 5
    """Members that imagine: those of the smallest error on held-out transitions."""
    holdout: float = 0.0
    """Share of the transitions that are held out to choose the elites."""
    layers: int = 3
    """Hidden layers of a member."""
    head_layers: int = 2
    """Hidden layers of the reward and the termination head."""
    units: int = 200
    """Width of all hidden layers."""
    propagation: Literal["ts_inf", "ts1", "expectation"] = "ts_inf"
    """What imagines a step. ts_inf: one elite for a whole rollout (TS-infinity); ts1: another one at every
    step (TS1), both with a sample of its normal distribution; expectation: the mean of all, without noise."""
    episodic: bool = False
    """Learn when episodes terminate; for tasks whose episodes can."""
    discount: float = 1.0
    """Discount per agent step (gamma); 0 takes 1 - 5 / T within [0.95, 0.995] for episodes of T steps."""
    statistics_rate: float = 0.01
    """Rate at which the statistics that normalise the data, and the held-out errors, follow every batch."""


class Arrived(NamedTuple):
    """A state: the observation [..., D], and what led to it: the observation before [..., D] and the action
    [..., A], zeros at an episode's start. member: int32 [...], which elite imagines, -1 until it is drawn."""

    obs: Array
    source: Array
    action: Array
    member: Array


class Memory(NamedTuple):
    """The acting state [B]. empty: nothing was observed yet."""

    now: Arrived
    empty: Array


def make(config: EnsembleConfig, spec: EnvSpec) -> WorldModel:
    """The ensemble for the observations and actions of ``spec``. Its features are the observation, flat.

    Uncertainties, in standard deviations of the observation's change per step, averaged over its entries:
    ``disagreement``, the standard deviation of the elites' means; ``aleatoric``, the mean of their own.
    """
    check(config)
    c = config
    discount = episode_discount(spec.max_steps, c.discount)
    if images := split_obs(spec.obs)[0]:
        raise UserError(f"the ensemble predicts vectors and no images, {spec.name} has {', '.join(images)}")
    size, action_size = sum(s.size * (s.classes or 1) for s in spec.obs.values()), spec.action.size
    member = MLP(c.layers, c.units, 2 * size)
    heads = {"reward": MLP(c.head_layers, c.units, 1)}
    if c.episodic:
        heads["termination"] = MLP(c.head_layers, c.units, 1)

    def init(key):
        member_key, *keys = jax.random.split(key, 1 + len(heads))
        x = jnp.zeros((1, size + action_size))
        members = jax.vmap(lambda k: member.init(k, x)["params"])(jax.random.split(member_key, c.members))
        x = jnp.zeros((1, 2 * size + action_size))
        return {
            "members": members,
            "bounds": jnp.broadcast_to(jnp.array(FIRST_BOUNDS)[:, None], (2, size)).copy(),
            "statistics": init_statistics(2 * size + 1, c.members if c.holdout else 0),
            **{name: head.init(k, x)["params"] for (name, head), k in zip(heads.items(), keys)},
        }

    def init_state(params, batch):
        vector = lambda: jnp.zeros((batch, size))
        now = Arrived(vector(), vector(), jnp.zeros((batch, action_size)), jnp.full(batch, -1, jnp.int32))
        return Memory(now, jnp.ones(batch, bool))

    def flatten(obs):
        return flatten_obs(obs, spec.obs, squash=lambda x: x)

    def normalise(params, x, begin, end):
        """Entries ``begin`` to ``end`` of (observation, change, reward) in their standard deviations."""
        mean, std = scale(params, begin, end)
        return (x - mean) / std

    def seen_by_networks(params, obs):
        return jnp.clip(normalise(params, obs, 0, size), -FARTHEST, FARTHEST)

    def gaussian(params, members, inputs, axis=None):
        """Mean and log-variance of the normalised change. members: parameters [K, ...]; inputs for all of
        them, or those of each on ``axis``; results with K in front, or on ``axis``."""
        out = jax.vmap(lambda p, x: apply(member, p, x), (0, axis), axis or 0)(members, inputs)
        mean, raw = jnp.split(out, 2, -1)
        return mean, soft_bounds(raw, *params["bounds"])

    def inputs_of(params, obs, action):
        return jnp.concatenate([seen_by_networks(params, obs), action], -1)

    def elites(params):
        if c.elites == c.members:
            return params["members"]
        best = jax.lax.top_k(-params["statistics"]["error"], c.elites)[1]
        return jax.tree.map(lambda x: x[best], params["members"])

    def head(name, params, state: Arrived):
        inputs = inputs_of(params, state.source, state.action)
        inputs = jnp.concatenate([inputs, seen_by_networks(params, state.obs)], -1)
        return apply(heads[name], params[name], inputs)[..., 0]

    def arrive(begins, obs, source, action):
        """What led to an observation; nothing where an episode begins."""
        member = jnp.full(begins.shape, -1, jnp.int32)
        return Arrived(obs, clear(begins, source), clear(begins, action), member)

    def observe(params, state, traj: Trajectory, keys) -> Observed:
        obs = flatten(traj.obs)
        begins = traj.is_first | previous(jnp.zeros_like(traj.is_first), state.empty)
        arrived = arrive(begins, obs, previous(obs, state.now.obs), traj.action)
        change = clear(begins, obs - arrived.source)
        target = sg(normalise(params, change, size, 2 * size))
        inputs = inputs_of(params, arrived.source, arrived.action)
        mean, log_var = gaussian(params, params["members"], inputs)
        weights, held = bootstrap(arrived.source, arrived.action, c.members, c.holdout)
        reward = sg(normalise(params, traj.reward, 2 * size, 2 * size + 1))
        low, high = params["bounds"]
        losses = {
            "nll": (weights * gaussian_nll(mean, log_var, target).mean(-1)).sum(0),
            "bounds": jnp.broadcast_to((high - low).sum(), begins.shape),
            "reward": jnp.square(head("reward", params, arrived) - reward),
        }
        if c.episodic:
            dist = Bernoulli(head("termination", params, arrived))
            losses["termination"] = dist.loss(traj.is_terminal.astype(jnp.float32))
        live = 1.0 - begins.astype(jnp.float32)
        losses = {name: live * loss for name, loss in losses.items()}
        error = jnp.square(mean - target).mean(-1)
        count = jnp.maximum(live.sum(), 1)
        metrics = {
            "dynamics_error": (live * error.mean(0)).sum() / count,
            "aleatoric": (live * jnp.exp(0.5 * log_var).mean((0, -1))).sum() / count,
        }
        rows = jnp.concatenate([arrived.source, change, traj.reward[..., None]], -1)
        statistics = update_statistics(
            params["statistics"], rows, live, error, held * live, c.statistics_rate
        )
        after = Memory(jax.tree.map(lambda x: x[-1], arrived), jnp.zeros_like(state.empty))
        return Observed(after, Starts((), arrived), obs, losses, sg(metrics), statistics=sg(statistics))

    def observe_step(params, state, prev_action, obs, is_first, key):
        now = arrive(is_first | state.empty, flatten(obs), state.now.obs, prev_action)
        return Memory(now, jnp.zeros_like(state.empty))

    def by_position(lead) -> bool:
        """Whether the particles of states [N, P, ...] are dealt to the elites in equal blocks."""
        return len(lead) > 2 and lead[-2] % c.elites == 0 and c.propagation != "expectation"

    def positions(order, lead):
        """The elite of each particle, where the i-th of ``order`` belongs to elite i // (P / K)."""
        block = jnp.argsort(order) // (lead[-2] // c.elites)
        return jnp.broadcast_to(block[:, None], lead).astype(jnp.int32)

    def imagine_init(params, starts, horizon):
        """With TS-infinity, a search's particles belong to elites by position, equally many to each."""
        lead = starts.states.member.shape
        if c.propagation != "ts_inf" or not by_position(lead):
            return starts.states
        return starts.states._replace(member=positions(jnp.arange(lead[-2]), lead))

    def imagine_step(params, ctx, state: Arrived, action, key):
        """One step of each state by its elite.

        A search's particles [N, P, E], P a multiple of the elites, are dealt to them in blocks, so that each
        elite runs its own and no other: in the same way for all N candidates, which compares like with like.
        Other states draw their elite one by one, and all elites run.
        """
        member_key, noise_key = jax.random.split(key)
        action = action.astype(jnp.float32)
        lead, inputs = action.shape[:-1], inputs_of(params, state.obs, action)
        if c.propagation == "expectation":
            member, change = state.member, gaussian(params, elites(params), inputs)[0].mean(0)
        else:
            if by_position(lead):
                redraw = c.propagation == "ts1"
                order = jnp.arange(lead[-2])
                order = jax.random.permutation(member_key, order) if redraw else order
                member = positions(order, lead)
                mean, log_var = in_blocks(params, inputs, order, redraw)
            else:
                drawn = jax.random.randint(member_key, lead, 0, c.elites)
                keep = (state.member >= 0) & (c.propagation == "ts_inf")
                member = jnp.where(keep, state.member, drawn)
                said = gaussian(params, elites(params), inputs)
                pick = lambda x: jnp.take_along_axis(x, member[None, ..., None], 0)[0]
                mean, log_var = map(pick, said)
            change = mean + jnp.exp(0.5 * log_var) * jax.random.normal(noise_key, mean.shape)
        mean, std = scale(params, size, 2 * size)
        return Arrived(state.obs + mean + std * change, state.obs, action, member)

    def in_blocks(params, inputs, order, permuted: bool):
        """Mean and log-variance for inputs [N, P, E, I] whose particles, in this order, belong to elites."""
        lead, axis = inputs.shape[:-1], inputs.ndim - 3
        take = lambda x, index: jnp.take(x, index, axis) if permuted else x
        blocks = *lead[:axis], c.elites, lead[axis] // c.elites, *lead[axis + 1 :]
        x = take(inputs, order).reshape(*blocks, -1)
        said = gaussian(params, elites(params), x, axis)
        return [take(x.reshape(*lead, size), jnp.argsort(order)) for x in said]

    def predict(params, state: Arrived) -> Prediction:
        mean, std = scale(params, 2 * size, 2 * size + 1)
        reward = mean[0] + std[0] * head("reward", params, state)
        cont = jnp.full_like(reward, discount)
        if c.episodic:
            cont = discount * (1 - Bernoulli(head("termination", params, state)).mean())
        # Free where no objective asks for it: compiled programs leave out what nobody reads.
        inputs = inputs_of(params, state.source, state.action)
        mean, log_var = gaussian(params, elites(params), inputs)
        uncertainty = {
            "disagreement": mean.std(0).mean(-1),
            "aleatoric": jnp.exp(0.5 * log_var).mean((0, -1)),
        }
        return Prediction(reward, cont, uncertainty)

    def decode(params, features):
        dists, begin = {}, 0
        for key in sorted(spec.obs):
            entry = spec.obs[key]
            width = entry.size * (entry.classes or 1)
            part, begin = features[..., begin : begin + width], begin + width
            if entry.classes is None:
                dists[key] = SymlogMSE(symlog(part))
            else:
                dists[key] = one_hot(part.reshape(*part.shape[:-1], *entry.shape, entry.classes))
        return dists

    return WorldModel(
        init=init,
        init_state=init_state,
        observe=observe,
        observe_step=observe_step,
        starts=lambda params, state: Starts((), state.now),
        imagine_init=imagine_init,
        imagine_step=imagine_step,
        predict=predict,
        features=lambda params, state: state.obs,
        decode=decode,
        param_groups=dict,
        storable=False,
    )


def bootstrap(source: Array, action: Array, members: int, holdout: float) -> tuple[Array, Array]:
    """How often each member has a transition in its bootstrap [B, ...], and whether it is held out [...].

    The weights are independent and Poisson of mean 1: what drawing as many transitions as there are, with
    replacement, gives in a large data set. They derive from the bits of the transition itself, source
    [..., D] and action [..., A], so that it has the same weights whenever replay serves it. Held-out ones
    have weight 0.
    """
    bits = jax.lax.bitcast_convert_type(sg(jnp.concatenate([source, action], -1)), jnp.uint32)
    factors = jnp.uint32(0x9E3779B1) * (2 * jnp.arange(bits.shape[-1], dtype=jnp.uint32) + 1)
    seeds = (bits * factors).sum(-1, dtype=jnp.uint32)
    draw = lambda seed: jax.random.uniform(jax.random.key(seed), (members + 1,))
    uniform = jax.vmap(draw)(seeds.ravel()).reshape(*seeds.shape, members + 1)
    held = uniform[..., -1] < holdout
    weights = (uniform[..., :-1, None] > POISSON).sum(-1)
    return jnp.moveaxis(jnp.where(held[..., None], 0, weights), -1, 0).astype(jnp.float32), held


def init_statistics(size: int, members: int) -> dict[str, Array]:
    """What is learned without gradients. mean, var: of (observation, change, reward) [size]; count: batches
    that were seen [1]; error: of each of the members [B] on held-out transitions, where there are such."""
    statistics = {"mean": jnp.zeros(size), "var": jnp.ones(size), "count": jnp.zeros(1)}
    return statistics | ({"error": jnp.zeros(members)} if members else {})


def update_statistics(
    old: dict[str, Array], rows: Array, live: Array, error: Array, held: Array, rate: float
) -> dict[str, Array]:
    """Moves mean and variance towards those of the rows [..., size] with weights ``live`` [...], and the
    members' errors [B, ...] towards those of the rows with weights ``held``; at first it averages batches."""
    average = lambda x, weight: (x * weight).sum() / jnp.maximum(weight.sum(), 1)
    columns = jax.vmap(average, (-1, None))
    count = old["count"] + 1
    mean = columns(rows, live)
    var = columns(jnp.square(rows - mean), live)

    def move(name, new, weight):
        step = jnp.where(weight.sum() > 0, jnp.maximum(1 / count, rate), 0)
        return old[name] + step * (new - old[name]), step

    new_mean, step = move("mean", mean, live)
    # Of the mixture of old and new: the means' distance counts too.
    new_var, _ = move("var", var + (1 - step) * jnp.square(mean - old["mean"]), live)
    new = {"mean": new_mean, "var": new_var, "count": count}
    if "error" in old:
        new["error"], _ = move("error", jax.vmap(average, (0, None))(error, held), held)
    return new


def scale(params: Any, begin: int, end: int) -> tuple[Array, Array]:
    """Mean and standard deviation of entries of (observation, change, reward); what never changes has 1."""
    mean, var = (sg(params["statistics"][name][begin:end]) for name in ("mean", "var"))
    return mean, jnp.where(var > 1e-12, jnp.sqrt(jnp.maximum(var, 1e-12)), 1.0)


def check(config: EnsembleConfig) -> None:
    """UserError for impossible values."""
    check_at_least("model.units", config.units, 1)
    check_between("model.members", config.members, 1, 1000)
    for field in ("layers", "head_layers"):
        check_between(f"model.{field}", getattr(config, field), 1, MAX_LAYERS)
    check_between("model.elites", config.elites, 1, config.members)
    check_between("model.holdout", config.holdout, 0, 0.9)
    if config.elites < config.members and not config.holdout:
        raise UserError(
            f"model.elites is {config.elites} of {config.members} model.members, and nothing is held out to "
            "choose them: set model.holdout to the share of the data that is, for instance 0.1"
        )
    check_between("model.discount", config.discount, 0, 1)
    check_between("model.statistics_rate", config.statistics_rate, 0, 1)
