"""No random key is used twice, in any program of a run. Traced, not compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from mbrl import envs
from mbrl.drivers import Source
from mbrl.imagination import rollout
from mbrl.programs import ACT, UPDATE, stream
from tests.helpers import MODEL, on_one_device, tiny_run
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
    programs, shapes = run.programs(), run.shapes()
    keys = jax.eval_shape(SEEDS.keys)
    trace(programs.init, keys)
    clock = jnp.int32(0)
    trace(programs.prefill, shapes, keys, clock)
    trace(programs.chunk, shapes, keys, clock)
    obs = {k: jax.ShapeDtypeStruct((1, 2, *s.shape), s.dtype) for k, s in ENV.spec.obs.items()}
    first = jax.ShapeDtypeStruct((1, 2), bool)
    trace(programs.act, shapes.train, shapes.actor, obs, first, keys, clock)


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
