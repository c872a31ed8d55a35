"""Plans that avoid or seek what a model is unsure of: weights by flag, their sign, and what TD-MPC2 reports."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import planners
from mbrl.agents import tdmpc
from mbrl.agents.planning import assemble
from mbrl.agents.tdmpc import TDMPCConfig
from mbrl.errors import UserError
from mbrl.planning import (
    PlanConfig,
    evaluate,
    make_objective,
    make_planner,
    plan_objective,
    read_weights,
)
from mbrl.types import Agent, ArraySpec, EnvSpec, Prediction, Simulator, UpdateInfo
from planners.random import RandomConfig, make
from world_models import tdmpc as tdmpc_model
from world_models.tdmpc import TDMPCModelConfig

ARMS = ArraySpec((2,), classes=2)
SPEC = EnvSpec("arms", {"x": ArraySpec((1,))}, ARMS)
SEARCH = RandomConfig(horizon=2, samples=32)
SMALL = dict(units=4, bins=5, bin_limit=2.0)
MODEL = tdmpc_model.make(TDMPCModelConfig(latent=4, simnorm=2, encoder_units=4, **SMALL), SPEC)
KNOWN, UNKNOWN = [1.0, 0.0], [0.0, 1.0]


class Arm(NamedTuple):
    """Which arm was chosen last, one-hot [..., 2]."""

    chosen: jax.Array


def two_arms(known: float = 0.0, unknown: float = 0.0) -> Simulator:
    """Two arms with these rewards. Of the second one a model has seen little: ``disagreement`` 1, else 0."""

    def predict(params, state: Arm):
        reward = state.chosen @ jnp.array([known, unknown])
        return Prediction(reward, jnp.ones_like(reward), {"disagreement": state.chosen[..., 1]})

    return Simulator(
        imagine_step=lambda params, ctx, state, action, key: Arm(action),
        predict=predict,
        features=lambda params, state: state.chosen,
    )


def choice(world: Simulator, config: PlanConfig, mode: str = "eval") -> list[float]:
    """The arm that a planner with these settings pulls first."""
    planner = make_planner(world, make(SEARCH, ARMS), config)
    objective = plan_objective(config, mode)
    plan = jax.jit(lambda aim, *args: planner.plan((), aim, *args, mode)[0])
    return plan(objective, planner.init(1), Arm(jnp.zeros((1, 2))), jnp.ones(1, bool), jax.random.key(0))[
        0
    ].tolist()


@pytest.mark.parametrize(
    ("rewards", "weight", "arm"),
    [
        ((0.5, 0.4), "", KNOWN),
        ((0.4, 0.5), "", UNKNOWN),
        ((0.4, 0.5), "disagreement=-1", KNOWN),  # pessimism leaves the better arm alone
        ((0.5, 0.4), "disagreement=1", UNKNOWN),  # optimism tries the worse one
        ((0.4, 0.9), "disagreement=-0.2", UNKNOWN),  # unless the reward is worth it
        ((0.9, 0.4), "disagreement=0.2", KNOWN),
    ],
)
def test_the_sign_of_a_weight(rewards, weight, arm):
    assert choice(two_arms(*rewards), PlanConfig(uncertainty=weight)) == arm


def test_exploration_is_for_training_only():
    """An agent with ``plan.explore`` seeks the unknown arm in training and not in evaluation; what
    ``plan.uncertainty`` says holds in both, and the two add up."""

    def actions(**plan: str):
        agents = ModuleType("arms")
        agents.make = lambda *args: Agent(lambda key: (), init_actor, act, update)
        agents.make_simulator = lambda *args: two_arms(known=0.1)
        agents.acting_params = lambda config, train, mode: ()
        parts = dict(agent=(), model=SimpleNamespace(discount=0.9), planner="random", search=SEARCH)
        config = SimpleNamespace(**parts, plan=PlanConfig(**plan))
        agent = assemble(agents, config, SPEC, MODEL, 1, planners.REGISTRY)
        args = (), agent.init_actor((), 1), {}, jnp.ones(1, bool), jax.random.key(0)
        return [agent.act(*args, mode)[0][0].tolist() for mode in ("train", "eval")]

    class Acting(NamedTuple):
        state: Arm
        action: jax.Array

    init_actor = lambda train, batch: Acting(Arm(jnp.zeros((batch, 2))), jnp.zeros((batch, 2)))
    act = lambda train, actor, *args: (actor.action, actor, {})
    update = lambda train, traj, key: (train, UpdateInfo({}))
    assert actions() == [KNOWN, KNOWN]
    assert actions(explore="disagreement=1") == [UNKNOWN, KNOWN]
    assert actions(uncertainty="disagreement=1") == [UNKNOWN, UNKNOWN]
    assert actions(uncertainty="disagreement=-1", explore="disagreement=1.05") == [KNOWN, KNOWN]


def test_weights_are_read():
    assert read_weights("plan.uncertainty", "") == {}
    assert read_weights("plan.uncertainty", "a=-1, b=0.5,") == {"a": -1.0, "b": 0.5}


@pytest.mark.parametrize("text", ["a", "a=", "=1", "a=1 b=2", "a=nan", "a=inf", "a:1"])
def test_other_forms_are_refused(text):
    with pytest.raises(UserError, match=r"^plan.explore is .*must name uncertainties and weights"):
        plan_objective(PlanConfig(explore=text), "train")


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match=r"plan.uncertainty.* weighs 'doubt', but this model has: disagree"):
        choice(two_arms(), PlanConfig(uncertainty="doubt=1"))


def test_spread_of_the_critics_of_tdmpc():
    """``value_std`` is the standard deviation over all critics: of the action that a step took, and of the
    policy's at the horizon."""
    config = TDMPCConfig(critics=4, **SMALL)
    simulator = tdmpc.make_simulator(config, SPEC, MODEL, 0.9)
    assert simulator.policy is not None and simulator.value is not None

    @jax.jit
    def everything(key):
        """What the simulator says, and the values of all critics at the same actions."""
        params = tdmpc.make(config, SPEC, MODEL, 0.9, 1).init(key).params
        params = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(x.size), x.shape), params)
        z = jax.nn.softmax(jax.random.normal(key, (3, 2, 2))).reshape(3, 4)
        action = jnp.eye(2)[jnp.array([0, 1, 1])]
        state = MODEL.imagine_step(params["model"], (), tdmpc_model.Latent(z, z, action), action, key)
        said = simulator.predict(params, state).uncertainty, simulator.value(params, z, key)[1]
        chosen = simulator.policy(params, z, jax.random.split(key)[1])
        values = lambda a: tdmpc.behaviour(config, SPEC).values(params["critic"], z, a).mean()
        return said, (values(action), values(chosen))

    for said, values in zip(*everything(jax.random.key(0))):
        np.testing.assert_allclose(said["value_std"], np.asarray(values, np.float64).std(0), rtol=1e-4)


def test_what_has_no_weight_is_not_computed():
    """A plan that weighs nothing costs as much as one whose model reports nothing."""
    config = TDMPCConfig(critics=4, **SMALL)
    params = jax.eval_shape(tdmpc.make(config, SPEC, MODEL, 0.9, 1).init, jax.random.key(0)).params
    simulator = tdmpc.make_simulator(config, SPEC, MODEL, 0.9)
    value = simulator.value
    assert value is not None
    silent = simulator._replace(
        predict=lambda *args: simulator.predict(*args)._replace(uncertainty={}),
        value=lambda *args: value(*args)[0],
    )

    def flops(simulator: Simulator, **weights: float) -> float:
        def score(params, state, actions):
            starts, keys = simulator.starts(params, state), (jax.random.key(0),) * 2
            return evaluate(simulator, params, make_objective(**weights), starts, actions, keys)

        state = jax.eval_shape(lambda p: MODEL.init_state(p["model"], 1), params)
        program = jax.jit(score).lower(params, state, jnp.zeros((2, 3, 1, 1, 2))).compile()
        return program.cost_analysis()["flops"]

    assert flops(simulator) == flops(silent) < flops(simulator, value_std=-1.0)
