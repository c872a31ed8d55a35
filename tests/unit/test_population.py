"""Members of a population with numbers of their own are the runs that they would be alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import planners
import world_models.tdmpc
from mbrl.agents import dreamer, pets, tdmpc
from mbrl.agents.pets import PETSConfig
from mbrl.agents.planning import assemble
from mbrl.agents.tdmpc import TDMPCConfig
from mbrl.errors import UserError
from mbrl.losses import episode_discount
from mbrl.optimisers import OptimiserConfig
from mbrl.planning import PlanConfig, RuleConfig
from mbrl.population import check_varied, varying, with_hyper, with_values
from mbrl.programs import example_row
from mbrl.types import ArraySpec, EnvSpec
from planners.cem import CEMConfig
from planners.mppi import MPPIConfig
from tests.helpers import AGENT, MODEL, TDMPC_MODEL
from tests.mesh import ENV, regression
from world_models import ensemble, rssm
from world_models.ensemble import EnsembleConfig

SPEC = EnvSpec("two", {"x": ArraySpec((2,))}, ArraySpec((1,)), 1, 50)


@dataclass(frozen=True)
class Small:
    """A config like an experiment's."""

    width: int = 8
    optimiser: OptimiserConfig = field(default_factory=lambda: OptimiserConfig(warmup=0, eps=1e-3))
    VARIES: ClassVar[tuple[str, ...]] = ()


def small(config: Small):
    return regression(ENV.spec, config.width, config.optimiser)


def test_a_member_equals_a_run_alone():
    """Three learning rates in one program, two updates: each as in an agent made with this number."""
    name, rates = "optimiser.learning_rate", [1e-3, 1e-2, 3e-2]
    agent = with_hyper(small, Small(), [name])
    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    row = example_row(agent, ENV.spec, 4)
    rng = np.random.default_rng(0)
    fill = lambda x: rng.normal(size=(5, *x.shape)).astype(x.dtype)
    traj = jax.tree.map(fill, row)

    def learn(agent, train, key):
        for i in range(2):
            train, info = agent.update(train, traj, jax.random.fold_in(key, i))
        return train, info.metrics

    train = jax.vmap(agent.init)(keys)
    train = train._replace(hyper={name: jnp.float32(rates)})
    together, metrics = jax.jit(jax.vmap(partial(learn, agent)))(train, keys)
    np.testing.assert_array_equal(together.hyper[name], np.float32(rates))
    for i, rate in enumerate(rates):
        alone = small(with_values(Small(), {name: rate}))
        result, one = learn(alone, alone.init(keys[i]), keys[i])
        for a, b in zip(jax.tree.leaves(result.params), jax.tree.leaves(together.params), strict=True):
            np.testing.assert_allclose(a, b[i], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(one["loss"], metrics["loss"][i], rtol=1e-5)
    assert len(np.unique(together.params["out"], axis=0)) == 3


def make_dreamer(config):
    model = rssm.make(config.model, SPEC)
    return dreamer.make(config.agent, SPEC, model, config.model.discount, 100)


def make_tdmpc(config):
    model = world_models.tdmpc.make(config.model, SPEC)
    return assemble(tdmpc, config, SPEC, model, 100, planners.REGISTRY)


def make_pets(config):
    return assemble(pets, config, SPEC, ensemble.make(config.model, SPEC), 100, planners.REGISTRY)


@dataclass(frozen=True)
class Parts:
    """An experiment's parts."""

    model: object
    agent: object
    search: RuleConfig = field(default_factory=MPPIConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    planner: str = "mppi"


CASES = {
    "dreamer": (make_dreamer, Parts(MODEL, AGENT)),
    "dreamer, dynamics": (make_dreamer, Parts(MODEL, replace(AGENT, actor_grad="dynamics"))),
    "tdmpc": (make_tdmpc, Parts(TDMPC_MODEL, TDMPCConfig(units=8, critics=3, bins=15, bin_limit=4.0))),
    "pets": (
        make_pets,
        Parts(
            EnsembleConfig(members=2, elites=2, layers=1, units=8),
            PETSConfig(),
            CEMConfig(horizon=2, iterations=2, samples=6, elites=3),
            planner="cem",
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_branches_on_what_may_vary(case):
    """Every declared field at once as an input of the program: acting and learning can be traced, and keep the
    shapes of the agent as it is."""
    build, config = CASES[case]
    names = varying(config)
    assert "agent.optimiser.learning_rate" in names and ("model.discount" in names) == (case != "pets")
    agent, plain = with_hyper(build, config, names), build(config)

    def everything(agent, key):
        train = agent.init(key)
        actor = agent.init_actor(train, 2)
        row = example_row(agent, SPEC, 2)
        action, actor, _ = agent.act(train, actor, row.obs, row.is_first, key, mode="train")
        traj = jax.tree.map(lambda x: jnp.zeros((5, *x.shape), x.dtype), row)
        train, info = agent.update(train, traj, key)
        return train._replace(hyper=()), actor, action, info.metrics

    shapes = lambda agent: jax.eval_shape(partial(everything, agent), jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes(agent)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes(plain)
    )


def test_a_varied_discount_of_0_is_the_one_that_suits_the_episodes():
    """As in a run alone, where 0 is known before anything is compiled."""
    suited = jax.jit(partial(episode_discount, 100))(jnp.array([0.0, 0.9]))
    np.testing.assert_allclose(suited, [episode_discount(100, 0.0), 0.9])
    assert episode_discount(100, 0.0) == 0.95

    def cont(discount):
        model = world_models.tdmpc.make(with_values(TDMPC_MODEL, {"discount": discount}), SPEC)
        params = model.init(jax.random.key(0))
        return model.predict(params, model.init_state(params, 1).now).cont[0]

    np.testing.assert_allclose(jax.vmap(cont)(jnp.array([0.0, 0.9])), [0.95, 0.9])


@pytest.mark.parametrize(
    ("vary", "words"),
    [
        ({"agent.units": [8, 16]}, "agent.units decides what is compiled"),
        ({"agent.horizon": [3, 5]}, "agent.optimiser.learning_rate"),
        ({"agent.entrpy": [0.1]}, "agent.entrpy"),
        ({"agent.entropy": [0.1, -1.0]}, "entropy"),
        ({"agent.lam": [0.1, 1.5]}, "agent.lam is 1.5"),
    ],
)
def test_what_cannot_vary_is_refused(vary, words):
    build, config = CASES["dreamer"]
    with pytest.raises(UserError, match=words):
        check_varied(config, vary, build)


def test_values_by_dotted_names():
    """Into copies, whatever holds them: what was given stays as it was."""
    base = SimpleNamespace(agent=AGENT, planner="none")
    changed = with_values(base, {"agent.optimiser.learning_rate": 0.5, "planner": "mppi"})
    assert changed.agent.optimiser.learning_rate == 0.5 and changed.planner == "mppi"
    assert base.agent is AGENT and AGENT.optimiser.learning_rate == 1e-3 and base.planner == "none"
    assert changed.agent.units == AGENT.units
