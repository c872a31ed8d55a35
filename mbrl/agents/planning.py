"""An agent that plans its actions; what and how it learns stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax

from mbrl.config import config_type, load_factory
from mbrl.errors import UserError
from mbrl.losses import episode_discount
from mbrl.planning import (
    Objective,
    Planner,
    PlanState,
    RuleConfig,
    check_numbers,
    make_planner,
    plan_objective,
)
from mbrl.types import Agent, Array, EnvSpec, WorldModel


class PlanningState(NamedTuple):
    """agent: the agent's own acting state; plan: of the planner; action: the previous action [E, A]."""

    agent: Any
    plan: PlanState
    action: Array


def with_planner(
    agent: Agent,
    planner: Planner,
    objective: Objective,
    acting_params: Callable[[Any, str], Any],
    explore: Objective | None = None,
) -> Agent:
    """``agent`` acting by ``planner`` instead of its policy, in training and evaluation.

    acting_params(train, mode) -> parameters for the planner's simulator. The agent's acting state has a field
    ``state``, the simulator's acting state, and a field ``action``. What explores in training is the noise
    that the agent reports, added to the action of a search that acts as in evaluation; without it the search
    rule explores, or does not. explore: the objective in mode "train", where it is another one.
    """

    def init_actor(train, batch: int) -> PlanningState:
        state = agent.init_actor(train, batch)
        return PlanningState(state, planner.init(batch), state.action.copy())

    def act(train, actor: PlanningState, obs, is_first, key, mode: str):
        agent_key, plan_key = jax.random.split(key)
        before = actor.agent._replace(action=actor.action)
        action, state, info = agent.act(train, before, obs, is_first, agent_key, mode)
        if mode == "watch":
            return action, actor._replace(agent=state, action=action), info
        params = acting_params(train, mode)
        aim = objective if explore is None or mode == "eval" else explore
        noise = info.get("noise") if mode == "train" else None
        seen = actor.plan, state.state, is_first
        how = mode if noise is None else "eval"
        action, plan, traces = planner.plan(params, aim, *seen, plan_key, how)
        action = action if noise is None else action + noise
        return action, PlanningState(state._replace(action=action), plan, action), info | {"plan": traces}

    return agent._replace(init_actor=init_actor, act=act)


def find_rule(name: str, registry: Mapping[str, str]) -> Callable[..., Any]:
    """The factory of a search rule."""
    return load_factory("--planner", name, dict(registry) | {"none": ""})


def default_search(name: str, registry: Mapping[str, str]) -> RuleConfig:
    """The default settings of a search rule; those without any field for ``none``."""
    return RuleConfig() if name == "none" else config_type(find_rule(name, registry))()


def assemble(
    agents: ModuleType, config: Any, spec: EnvSpec, model: WorldModel, updates: int, rules: Mapping[str, str]
) -> Agent:
    """The agent of a module of `mbrl.agents` with the settings ``config.agent``, on ``model``, acting by the
    planner that ``config.planner`` names with the settings ``config.search`` and ``config.plan``; by its
    policy for ``none``.

    The module has make, make_simulator and acting_params. updates: length of the run. rules: search rules by
    name.
    """
    check_numbers(config.plan)
    discount = config.model.discount
    if not spec.tasks:
        discount = episode_discount(spec.max_steps, discount)
    agent = agents.make(config.agent, spec, model, discount, updates)
    simulator = agents.make_simulator(config.agent, spec, model, discount)
    if config.planner == "none":
        if simulator.policy is None:
            raise UserError("planner is none, but this agent has no policy: name one to choose its actions")
        return agent
    rule = find_rule(config.planner, rules)(config.search, spec.action)
    planner = make_planner(simulator, rule, config.plan)
    # The objective adds no discount: it is in the model's ``cont``.
    aim, explore = (plan_objective(config.plan, mode) for mode in ("eval", "train"))
    return with_planner(agent, planner, aim, partial(agents.acting_params, config.agent), explore)
