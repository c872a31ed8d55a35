"""The whole loop on the device: environment, replay, updates and evaluation as programs that ask the host for
nothing, for every agent and world model, an environment with costly resets included."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from mbrl import envs, evaluation
from mbrl.drivers import Source
from tests.conformance.test_world_models import tiny
from tests.helpers import on_one_device, tiny_run, tiny_tdmpc_run

ENV = envs.make_jax("pendulum", max_steps=6)._replace(costly_reset=True)
SOURCE = Source(ENV.spec, ENV)
AGENTS = ("tdmpc", "rssm", "transformer", "s4wm", "r2i", "koopman")
"""TD-MPC2, and Dreamer on every backbone."""


def all_but(*fast: str) -> list:
    """Agents; those that are not ``fast`` are marked slow, as each takes seconds to trace or compile."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in AGENTS]


@functools.cache
def make_run(name: str, seeds: int):
    """Of as many seeds, batched on one device, as on an accelerator."""
    members = on_one_device(*range(seeds))
    if name == "tdmpc":
        return tiny_tdmpc_run(SOURCE, members)
    factory, config = tiny(name, name)
    model = factory(config, SOURCE.spec)
    return tiny_run(SOURCE, members, agent={"replay_context": model.storable}, model=model)


def traced(name: str, seeds: int) -> str:
    run = make_run(name, seeds)
    programs, keys = run.programs(), run.seeds.keys()
    return str(jax.make_jaxpr(programs.chunk)(jax.eval_shape(programs.init, keys), keys, np.int32(0)))


@pytest.mark.parametrize("name", all_but("tdmpc", "rssm", "transformer"))
def test_no_callbacks_and_no_branches_per_seed(name):
    """A branch on what differs per seed becomes a selection, and both sides are computed at every step. There is
    one branch, that of the clock, which draws fresh starts."""
    alone, batched = traced(name, 1), traced(name, 2)
    assert "callback" not in alone
    assert alone.count(" cond[") == batched.count(" cond[") == 1


@pytest.mark.parametrize("name", all_but("rssm"))
def test_nothing_is_transferred(name):
    """Prefill, a chunk with updates and an evaluation, once they are compiled: JAX refuses every transfer that is
    not asked for in so many words. One is, the clock. Buffers of the state are handed over."""
    run = make_run(name, 2)
    programs, keys = run.programs(), run.seeds.keys()
    evaluate = evaluation.make_device(run.agent, ENV, run.seeds, 2)

    def once(state):
        clock = lambda i: jax.device_put(np.int32(i))
        for i in range(run.clock.prefill):
            state, _ = programs.prefill(state, keys, clock(i))
        before = jax.tree.leaves(state)
        state, metrics, episodes = programs.chunk(state, keys, clock(run.clock.prefill))
        assert all(leaf.is_deleted() for leaf in before)
        return state, metrics, episodes, evaluate(state.train, keys)

    state, *_ = once(programs.init(keys))
    with jax.transfer_guard("disallow"):
        state, metrics, episodes, returns = once(state)
    assert np.asarray(state.health.rejected).tolist() == [0, 0]
    assert returns.shape == (2, 2) and np.isfinite(returns).all() and episodes.count.shape == (2,)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(metrics))
