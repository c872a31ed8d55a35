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


def primitives(jaxpr) -> set[str]:
    """Names of all operations of a program, those inside of loops and calls included."""
    inner = [
        part
        for equation in jaxpr.eqns
        for part in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns"))
        if hasattr(part, "eqns")
    ]
    return {equation.primitive.name for equation in jaxpr.eqns}.union(*map(primitives, inner))


def asks_the_host(jaxpr) -> set[str]:
    words = ("callback", "infeed", "outfeed", "debug", "print")
    return {name for name in primitives(jaxpr) if any(word in name for word in words)}


def test_a_question_to_the_host_is_found():
    """Wherever it is: in a loop, in a branch, in a function of its own."""
    shape = jax.ShapeDtypeStruct((), np.float32)

    def inside(ask):
        step = lambda x, _: (jax.lax.cond(x > 0, jax.jit(ask), lambda x: x, x), ())
        return jax.make_jaxpr(lambda x: jax.lax.scan(step, x, length=2))(np.float32(0))

    assert not asks_the_host(inside(lambda x: x + 1))
    assert asks_the_host(inside(lambda x: jax.pure_callback(np.sin, shape, x)))
    assert asks_the_host(inside(lambda x: jax.experimental.io_callback(np.sin, shape, x)))

    def shown(x):
        jax.debug.print("{}", x)
        return x

    assert asks_the_host(inside(shown))


@pytest.mark.parametrize("name", all_but("tdmpc", "rssm"))
def test_no_program_asks_the_host(name):
    """Neither prefill nor a chunk nor an evaluation, whatever the device."""
    run = make_run(name, 1)
    programs, keys = run.programs(), run.seeds.keys()
    state = jax.eval_shape(programs.init, keys)
    for program in (programs.prefill, programs.chunk):
        assert not asks_the_host(jax.make_jaxpr(program)(state, keys, np.int32(0)))
    evaluate = evaluation.device_program(run.agent, ENV, run.seeds, 2)
    assert not asks_the_host(jax.make_jaxpr(evaluate)(state.train, keys))


@pytest.mark.parametrize("name", all_but("tdmpc", "rssm", "transformer"))
def test_no_branches_per_seed(name):
    """A branch on what differs per seed becomes a selection, and both sides are computed at every step. There is
    one branch, that of the clock, which draws fresh starts."""
    alone, batched = traced(name, 1), traced(name, 2)
    assert alone.count(" cond[") == batched.count(" cond[") == 1


@pytest.mark.parametrize("name", all_but("rssm"))
def test_nothing_is_transferred_to_the_device(name):
    """Into prefill, a chunk with updates and an evaluation, once they are compiled: every argument is on the
    device already, but for the clock, which is put there in so many words. Buffers of the state are handed
    over. On a CPU, whose memory is the host's, JAX refuses transfers to the device alone: that programs take
    nothing back is the matter of the test above."""
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
