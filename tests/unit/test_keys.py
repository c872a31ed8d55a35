"""No random key is used twice, in any program of a run. Traced, not compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import planners
import world_models.tdmpc
from mbrl import envs
from mbrl.agents import tdmpc
from mbrl.agents.planning import default_search
from mbrl.agents.tdmpc import TDMPCConfig
from mbrl.config import load_factory
from mbrl.drivers import Source
from mbrl.imagination import rollout
from mbrl.planning import make_objective, make_planner
from mbrl.programs import ACT, UPDATE, stream
from tests.helpers import MODEL, TDMPC_MODEL, on_one_device, tiny_run
from tests.unit.test_golden_steps import MODELS, batch, make_agent
from world_models import rssm

ENV = envs.make_jax("pendulum", max_steps=6)
SEEDS = on_one_device(0)


def trace(function, *shapes) -> None:
    """Raises KeyReuseError where ``function`` uses a key twice."""
    with jax.debug_key_reuse(True):
        jax.jit(function).trace(*shapes)


@pytest.fixture(scope="module")
def run():
    return tiny_run(Source(ENV.spec, ENV), SEEDS)


def test_a_reuse_is_seen():
    """Else the tests below would prove nothing: in a program, in a scan, and in a program inside another."""

    def twice(key):
        return jax.random.normal(key) + jax.random.uniform(key)

    def carried(key):
        return jax.lax.scan(lambda c, _: (c + jax.random.normal(key), None), 0.0, None, 3)[0]

    for function in (twice, carried, jax.jit(twice)):
        with pytest.raises(jax.errors.KeyReuseError):
            trace(function, jax.random.key(0))
    with pytest.raises(jax.errors.KeyReuseError):
        trace(jax.vmap(twice), jax.random.split(jax.random.key(0), 2))


def test_programs(run):
    """Initialisation, prefill, a chunk of collecting and updates, acting on the host."""
    programs, shapes = run.programs(), run.shapes
    keys = jax.eval_shape(SEEDS.keys)
    trace(programs.init, keys)
    clock = jnp.int32(0)
    trace(programs.prefill, shapes, keys, clock)
    trace(programs.chunk, shapes, keys, clock)
    obs = {k: jax.ShapeDtypeStruct((1, 2, *s.shape), s.dtype) for k, s in ENV.spec.obs.items()}
    first = jax.ShapeDtypeStruct((1, 2), bool)
    trace(programs.act, shapes.train, shapes.actor, obs, first, keys, clock)


@pytest.mark.parametrize("name", MODELS)
def test_update(name):
    """Initialisation and one update of every agent."""
    agent = make_agent(name)

    def first(key):
        init_key, key = jax.random.split(key)
        return agent.update(agent.init(init_key), batch(), key)

    trace(first, jax.random.key(0))


@pytest.mark.parametrize("name", ["mppi", "icem", "cem"])
def test_plan(name):
    """A search, without the value behind its horizon: all rounds ask for that with one key, on purpose."""
    model = world_models.tdmpc.make(TDMPC_MODEL, ENV.spec)
    config = TDMPCConfig(units=8, bins=15, bin_limit=4.0)
    simulator = tdmpc.make_simulator(config, ENV.spec, model, 0.9)._replace(value=None)
    rule = load_factory("planner", name, planners.REGISTRY)
    rule = rule(default_search(name, planners.REGISTRY), ENV.spec.action)
    planner = make_planner(simulator, rule)
    agent = tdmpc.make(config, ENV.spec, model, 0.9, 10)

    def first(key):
        init_key, key = jax.random.split(key)
        train = agent.init(init_key)
        state, start = model.init_state(train.params["model"], 2), jnp.ones(2, bool)
        return planner.plan(train.params, make_objective(), planner.init(2), state, start, key, "train")

    trace(first, jax.random.key(0))


def test_rollout():
    model = rssm.make(MODEL, ENV.spec)

    def imagine(key):
        init_key, key = jax.random.split(key)
        params = model.init(init_key)
        starts = model.starts(params, model.init_state(params, 2))
        noise = lambda features, key, t: jax.random.normal(key, (*features.shape[:-1], 1))
        return rollout(model, params, starts, noise, key, 3)

    trace(imagine, jax.random.key(0))


def test_streams_are_apart():
    """The keys of two streams, two clocks and two seeds never coincide."""
    keys = [
        jax.random.key_data(stream(jax.random.key(seed), name, clock)).tolist()
        for seed in range(3) for name in (ACT, UPDATE) for clock in range(50)
    ]  # fmt: skip
    assert len({tuple(key) for key in keys}) == len(keys)
