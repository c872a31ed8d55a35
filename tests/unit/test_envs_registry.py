"""Names of environments."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mbrl import envs


def test_kinds():
    assert envs.is_jax("pendulum") and not envs.is_jax("pendulum_swingup") and not envs.is_jax("nothing")
    assert {"pendulum", "probe_memory", "walker_walk", "pendulum_swingup"} <= set(envs.names())


def test_options_reach_the_factory():
    assert envs.make_jax("pendulum", max_steps=7).spec.max_steps == 7
    assert envs.make_host("cup_catch", 0, 4).spec.max_steps == 250


@pytest.mark.parametrize(
    "make, name, part",
    [
        (envs.make_jax, "probe_memry", "'probe_memory'"),
        (envs.make_jax, "pendulm_swingup", "'pendulum_swingup'"),
        (lambda name: envs.make_host(name, 0), "probe_memry", "'probe_memory'"),
        (envs.make_jax, "walker_walk", "is a task of dm_control"),
        (lambda name: envs.make_host(name, 0), "pendulum", "is an environment written in JAX"),
        (envs.make_jax, "HalfCheetah-v5", "gymnasium's is gym:HalfCheetah-v5"),
        (envs.make_jax, "my.module", "your own is MODULE:FACTORY"),
        (envs.make_jax, "qqqqqqqq", "There is no task or environment 'qqqqqqqq'; list all with"),
    ],
)
def test_unknown_names_of_either_kind(make, name, part):
    with pytest.raises(ValueError) as caught:
        make(name)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_the_hint_for_listing_works():
    command = str(envs.unknown("nothing")).split('-c "')[1].rstrip('"')
    out = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0 and "walker_walk" in out.stdout.split()
