"""Planning: a search rule proposes action sequences, a simulator rolls them out, an objective scores them.

A rule knows nothing of models: it is asked for candidates and told their scores. `make_planner` joins a rule
and a simulator; rules are in ``planners/``, one file each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from mbrl.errors import UserError, check_at_least, check_between
from mbrl.imagination import rollout
from mbrl.types import Array, ArraySpec, Params, PyTree, Simulator, Starts, State, WorldModel


class Objective(NamedTuple):
    """What a search maximises; arrays, so that values can differ per seed and change without a recompile.

    With D_t = product over s <= t of discount * cont_s, the score of a rollout of H steps is
    sum_{t=1..H} D_{t-1} (reward_t + w u_t) + value D_H (V_H + w u_V), where w u sums over uncertainties.

    discount: factor per imagined step [], beside the model's own ``cont``; 1 for models whose continue head
    learned the discount (all of `mbrl.latent_model`). value: weight of the terminal value [], usually 0 or 1.
    uncertainty: signed weight [] of named uncertainties; negative is pessimism, positive curiosity.
    """

    discount: Any
    value: Any
    uncertainty: dict[str, Any]


def make_objective(discount: float = 1.0, value: float = 1.0, **uncertainty: float) -> Objective:
    """An `Objective` of float32 arrays; keywords are the weights of uncertainties."""
    return jax.tree.map(jnp.float32, Objective(discount, value, uncertainty))


class Stage(NamedTuple):
    """Iterations of a search that evaluate equally many candidates. gradient: whether the rule is told the
    gradients of the scores too."""

    iterations: int
    samples: int
    gradient: bool = False


class SearchRule(NamedTuple):
    """A way to search for action sequences [H, A], for ONE environment; the planner adds the axis E.

    init_warm() -> warm; what one search hands to the next, at the start of an episode
    start(warm, proposals [K, H, A], key) -> search
    ask(search, stage, i, key) -> candidates [stage.samples, H, A]; i counts the iterations of all stages
    tell(search, stage, candidates, scores [N], gradients [N, H, A] or None) -> search; a candidate whose
        score is not finite comes with -inf; at least one is finite, else the search stays as it was
    select(search, key, mode) -> sequence [H, A] to execute
    shift(search, steps) -> warm, after ``steps`` actions were executed
    action: what it searches over. horizon: H, in actions. stages: one after the other. policy_samples: K,
    proposals that it wants from the policy. greedy: whether these are its most likely actions in mode "eval".
    """

    init_warm: Callable[[], PyTree]
    start: Callable[..., PyTree]
    ask: Callable[..., Array]
    tell: Callable[..., PyTree]
    select: Callable[..., Array]
    shift: Callable[..., PyTree]
    action: ArraySpec
    horizon: int
    stages: tuple[Stage, ...]
    policy_samples: int = 0
    greedy: bool = False


class PlanState(NamedTuple):
    """What a planner carries per environment, [E, ...]. warm: of the rule; actions: those of the current plan
    that are executed; left: how many of them are still to come."""

    warm: PyTree
    actions: Array
    left: Array


class Planner(NamedTuple):
    """Plans for E environments at once.

    init(batch) -> PlanState [batch]
    plan(params, objective, warm [E], state [E], is_first [E], key, mode) -> (action [E, A], warm, info);
        state: acting states of the simulator; is_first forgets an environment's warm start; mode as in
        `Agent.act`. info: "best", "mean" and "std" [I, E], the best and mean score and the spread of the
        candidates at each iteration, nan where no search was due or no score finite
    """

    init: Callable[[int], PlanState]
    plan: Callable[..., tuple[Array, PlanState, dict[str, Array]]]


@dataclass(frozen=True)
class RuleConfig:
    """Settings of a search rule; each extends them by its own."""


@dataclass(frozen=True)
class PlanConfig:
    """How a planner uses its search rule."""

    action_block: int = 1
    """Agent steps that each action of a plan lasts."""
    replan_every: int = 1
    """Actions of a plan that are executed before the next search."""
    particles: int = 1
    """Rollouts of each candidate, for stochastic models (P)."""
    risk: Literal["mean", "worst", "cvar"] = "mean"
    """How the scores of the particles become one: their mean, the worst, or the mean of the worst ones."""
    risk_fraction: float = 0.25
    """Share of the particles that cvar averages (alpha)."""
    value: float = 1.0
    """Weight of the terminal value in the score of a plan; 0 plans for the horizon alone."""
    uncertainty: str = ""
    """Weights of named uncertainties in what plans maximise, as in disagreement=-1,value_std=-0.5: below zero
    for pessimism, above for optimism."""
    explore: str = ""
    """The same, added in training only: optimism that explores."""


def read_weights(field: str, text: str | Mapping[str, Any]) -> dict[str, Any]:
    """Weights by name from ``name=weight,...``; UserError for another form. Those that a program was given as
    arrays stay as they are."""
    if isinstance(text, Mapping):
        return dict(text)
    found = {}
    for part in filter(None, text.split(",")):
        name, _, weight = part.partition("=")
        try:
            found[name.strip()] = float(weight)
        except ValueError:
            found[name.strip()] = math.nan
    if not all(name and math.isfinite(weight) for name, weight in found.items()):
        raise UserError(f"{field} is {text!r}, it must name uncertainties and weights, as in disagreement=-1")
    return found


def plan_objective(config: PlanConfig, mode: str, discount: float = 1.0) -> Objective:
    """What plans maximise in mode "train" or "eval"."""
    weights = read_weights("plan.uncertainty", config.uncertainty)
    if mode == "train":
        for name, weight in read_weights("plan.explore", config.explore).items():
            weights[name] = weights.get(name, 0.0) + weight
    weighed = {name: jnp.float32(weight) for name, weight in weights.items()}
    return make_objective(discount, config.value)._replace(uncertainty=weighed)


def check_numbers(config: PlanConfig) -> None:
    """UserError for values that no rule could use."""
    for name in ("uncertainty", "explore"):
        read_weights(f"plan.{name}", getattr(config, name))
    for name in ("action_block", "replan_every", "particles"):
        check_at_least(f"plan.{name}", getattr(config, name), 1)
    check_between("plan.risk_fraction", config.risk_fraction, 0, 1)
    check_at_least("plan.value", config.value, 0)


def check(config: PlanConfig, rule: SearchRule, simulator: Simulator) -> None:
    """UserError for impossible values and combinations."""
    check_numbers(config)
    if config.replan_every > rule.horizon:
        raise UserError(
            f"plan.replan_every is {config.replan_every}, it must be at most search.horizon, "
            f"which is {rule.horizon}"
        )
    if rule.policy_samples and simulator.policy is None:
        raise UserError(
            f"search.policy_samples is {rule.policy_samples}, but there is no policy to draw them from: "
            f"set it to 0, or choose a planner that needs no policy"
        )


def simulator_of(
    model: WorldModel, policy=None, value=None, mask=None, entry: str | None = None
) -> Simulator:
    """The simulator of a world model and an agent's policy, value and action mask, where it has them. All get
    the same parameters; ``entry`` names the part of them that is the model's, where they hold more."""

    def of_model(function):
        return lambda params, *args: function(params if entry is None else params[entry], *args)

    names = "starts", "imagine_init", "imagine_step", "predict", "features"
    functions = {name: of_model(getattr(model, name)) for name in names}
    return Simulator(**functions, emit=model.emit, policy=policy, value=value, mask=mask)


def evaluate(
    simulator: Simulator, params: Params, objective: Objective, starts: Starts, actions: Array, keys
) -> Array:
    """Scores [N, P, E] of actions [H, N, P, E, A] from starts [E]; keys: of the dynamics and of the value."""
    step_key, value_key = keys
    starts = starts._replace(states=expand(starts.states, actions.shape[1:3]))
    follow = lambda features, key, t: actions[t]
    states, _ = rollout(simulator, params, starts, follow, step_key, actions.shape[0])
    said = simulator.predict(params, jax.tree.map(lambda x: x[1:], states))
    tail, known = jnp.zeros(said.reward.shape[1:]), set(said.uncertainty)
    if simulator.value is not None:
        features = simulator.features(params, jax.tree.map(lambda x: x[-1], states))
        value = simulator.value(params, features, value_key)
        value, uncertainty = value if isinstance(value, tuple) else (value, {})
        tail, known = objective.value * (value + weigh(objective, uncertainty)), known | set(uncertainty)
    for name in objective.uncertainty:
        if name not in known:
            allowed = ", ".join(sorted(known)) or "none"
            raise UserError(
                f"the objective (plan.uncertainty, plan.explore) weighs {name!r}, but this model has: "
                f"{allowed}"
            )
    gain = said.reward + weigh(objective, said.uncertainty)
    backward = lambda score, step: (step[0] + step[1] * score, None)
    return jax.lax.scan(backward, tail, (gain, objective.discount * said.cont), reverse=True)[0]


def weigh(objective: Objective, uncertainty: dict[str, Array]) -> Any:
    """Sum of the uncertainties that the objective names."""
    return sum(w * uncertainty[name] for name, w in objective.uncertainty.items() if name in uncertainty)


def expand(states: State, lead: tuple[int, ...]) -> State:
    """The same states [E, ...] for every candidate, [*lead, E, ...]."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (*lead, *x.shape)), states)


def reduce_risk(scores: Array, risk: str, fraction: float) -> Array:
    """Scores of particles [N, P, E] -> [N, E]. A particle that is not finite makes its candidate so."""
    finite = jnp.isfinite(scores).all(1)
    if risk != "mean":
        tail = 1 if risk == "worst" else max(1, round(fraction * scores.shape[1]))
        scores = jnp.sort(scores, 1)[:, :tail]
    return jnp.where(finite, scores.mean(1), -jnp.inf)


def where_env(condition: Array, yes: PyTree, no: PyTree) -> PyTree:
    """Elementwise choice by environment: condition [E], leaves [E, ...]."""
    pick = lambda a, b: jnp.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b)
    return jax.tree.map(pick, yes, no)


def env_keys(key: Array, batch: int) -> Array:
    """A key for each environment [E], which does not depend on how many there are."""
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(batch))


def make_planner(simulator: Simulator, rule: SearchRule, config: PlanConfig = PlanConfig()) -> Planner:
    """A planner for the environments of ``simulator``. UserError for settings that do not fit together."""
    check(config, rule, simulator)
    size, executed = rule.action.size, config.replan_every * config.action_block
    search = make_search(simulator, rule, config)

    def init(batch: int) -> PlanState:
        warm = expand(rule.init_warm(), (batch,))
        return PlanState(warm, jnp.zeros((batch, executed, size)), jnp.zeros(batch, jnp.int32))

    def plan(params, objective, warm: PlanState, state, is_first, key, mode: str):
        batch = is_first.shape[0]
        warm = where_env(is_first, init(batch), warm)
        due = warm.left == 0

        def replan(warm: PlanState):
            actions, following, trace = search(params, objective, warm.warm, state, batch, key, mode)
            actions = jnp.repeat(actions[:, : config.replan_every], config.action_block, 1)
            fresh = PlanState(following, actions, jnp.full(batch, executed, jnp.int32))
            return where_env(due, fresh, warm), jax.tree.map(lambda x: jnp.where(due, x, jnp.nan), trace)

        def go_on(warm: PlanState):
            trace = jax.eval_shape(replan, warm)[1]
            return warm, jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), trace)

        if executed == 1:
            warm, info = replan(warm)
        else:
            # Skipping the search is the point of a longer plan. Batched seeds turn this into a select, which
            # computes the same at full cost.
            warm, info = jax.lax.cond(due.any(), replan, go_on, warm)
        action = warm.actions[jnp.arange(batch), executed - warm.left]
        return action, warm._replace(left=warm.left - 1), info

    return Planner(init, plan)


def make_search(simulator: Simulator, rule: SearchRule, config: PlanConfig) -> Callable[..., Any]:
    """``search(params, objective, warm [E], state [E], E, key, mode)`` -> (sequences [E, H, A], the next
    warm start [E], traces [I, E])."""
    block, size = config.action_block, rule.action.size

    def propose(params, starts: Starts, batch: int, key, mode: str) -> Array:
        """Sequences of the policy [E, K, H, A]."""
        policy = simulator.policy
        if not rule.policy_samples or policy is None:
            return jnp.zeros((batch, 0, rule.horizon, size))
        greedy = rule.greedy and mode == "eval"
        follow = lambda features, key, t: policy(params, features, None if greedy else key)
        starts = starts._replace(states=expand(starts.states, (rule.policy_samples, 1)))
        _, actions = rollout(simulator, params, starts, follow, key, rule.horizon * block)
        actions = jnp.clip(jnp.nan_to_num(actions[::block, :, 0]), -1.0, 1.0)
        return jax.lax.stop_gradient(actions).transpose(2, 1, 0, 3)

    def score(candidates, params, objective, starts: Starts, keys) -> tuple[Array, Array]:
        """Sum and values of the scores [E, N] of candidates [E, N, H, A]."""
        actions = jnp.repeat(candidates.transpose(2, 1, 0, 3), block, 0)[:, :, None]
        actions = jnp.broadcast_to(actions, (*actions.shape[:2], config.particles, *actions.shape[3:]))
        scores = evaluate(simulator, params, objective, starts, actions, keys)
        scores = reduce_risk(scores, config.risk, config.risk_fraction).T
        return scores.sum(), scores

    def search(params, objective: Objective, warm, state, batch: int, key, mode: str):
        starts = simulator.starts(params, state)
        mask = jnp.ones((batch, size)) if simulator.mask is None else simulator.mask(params, state)
        proposal_key, start_key, loop_key, value_key, select_key = jax.random.split(key, 5)
        proposals = propose(params, starts, batch, proposal_key, mode) * mask[:, None, None]
        found = jax.vmap(rule.start)(warm, proposals, env_keys(start_key, batch))

        def iterate(stage: Stage, found, i):
            ask_key, step_key = jax.random.split(jax.random.fold_in(loop_key, i))
            ask = lambda found, key: rule.ask(found, stage, i, key)
            candidates = jax.vmap(ask)(found, env_keys(ask_key, batch)) * mask[:, None, None]
            args = candidates, params, objective, starts, (step_key, value_key)
            if stage.gradient:
                (_, scores), gradients = jax.value_and_grad(score, has_aux=True)(*args)
            else:
                (_, scores), gradients = score(*args), None
            finite = jnp.isfinite(scores)
            scores = jnp.where(finite, scores, -jnp.inf)
            told = jax.vmap(lambda *args: rule.tell(args[0], stage, *args[1:]))(
                found, candidates, scores, gradients
            )
            mean = jnp.where(finite, scores, 0.0).sum(1) / finite.sum(1)
            trace = {"best": scores.max(1), "mean": mean, "std": candidates.std(1).mean((1, 2))}
            return where_env(finite.any(1), told, found), trace

        traces, begin = [{name: jnp.zeros((0, batch)) for name in ("best", "mean", "std")}], 0
        for stage in rule.stages:
            steps = jnp.arange(begin, begin + stage.iterations)
            found, trace = jax.lax.scan(partial(iterate, stage), found, steps)
            traces, begin = [*traces, trace], begin + stage.iterations
        trace = jax.tree.map(lambda *xs: jnp.concatenate(xs), *traces)
        select = lambda found, key: rule.select(found, key, mode)
        sequences = jax.vmap(select)(found, env_keys(select_key, batch)) * mask[:, None]
        following = jax.vmap(lambda found: rule.shift(found, config.replan_every))(found)
        return sequences, following, trace

    return search
