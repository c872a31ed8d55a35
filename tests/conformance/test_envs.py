"""What every environment must do, written once for all. A new environment is one line in CASES."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from mbrl import envs
from mbrl.envs import checks
from mbrl.envs.checks import JaxAsHost
from mbrl.envs.pixels import CameraConfig
from mbrl.types import JaxEnv


class Case(NamedTuple):
    """open(seed) -> an environment with the methods of HostEnv. end: "terminal", "truncated" or None for
    episodes without a fixed end. random: whether another seed shows another first observation. length: agent
    steps of an episode."""

    name: str
    open: Callable[[int], Any]
    end: str | None
    length: int | None
    random: bool = True


jax_env = functools.cache(envs.make_jax)  # compiled once per environment, not once per test


@functools.cache
def mjx_env(task: str) -> JaxEnv:
    from mbrl.envs import mjx

    return mjx.make(task)


def jax_case(name: str, end: str, length: int, random: bool = True, **options: Any) -> Case:
    return Case(name, lambda seed: JaxAsHost(jax_env(name, **options), seed), end, length, random)


def host_case(task: str, length: int | None = 500, action_repeat: int = 2) -> Case:
    end = "truncated" if length else None
    return Case(task, lambda seed: envs.make_host(task, seed, action_repeat), end, length)


def gym_case(name: str, length: int | None, end: str | None = "truncated", action_repeat: int = 1) -> Case:
    """length None: the episode's end depends on what is done."""
    case = host_case(f"gym:{name}", length, action_repeat)
    return case._replace(end=end)


CASES = [
    jax_case("cartpole", "truncated", 500),
    jax_case("pendulum", "truncated", 500),
    jax_case("pendulum", "truncated", 500, shown="pixels", camera=CameraConfig(size=16, frame_stack=2)),
    jax_case("cartpole", "truncated", 500, shown="both", camera=CameraConfig(size=16)),
    jax_case("pendulum_dense", "truncated", 7, max_steps=7),
    jax_case("probe_constant", "terminal", 5, random=False),
    jax_case("probe_constant_truncated", "truncated", 5, random=False),
    jax_case("probe_observation", "terminal", 1),
    jax_case("probe_delayed", "terminal", 2),
    jax_case("probe_action", "terminal", 1),
    jax_case("probe_action_discrete", "terminal", 1),
    jax_case("probe_memory", "terminal", 4),
    jax_case("probe_memory_discrete", "terminal", 6, gap=5),
    jax_case("recall", "terminal", 7, gap=6),
    jax_case("tmaze", "terminal", 21),
    jax_case("hallway", "terminal", 6, width=6),
    jax_case("memory_chain", "terminal", 21),
    jax_case("gymnax:Pendulum-v1", "truncated", 200),
    jax_case("brax:reacher:positional", "truncated", 1000),
    Case("mjx:point_mass_easy", lambda seed: JaxAsHost(mjx_env("point_mass_easy"), seed), "truncated", 500),
    host_case("cartpole_swingup"),
    host_case("cup_catch"),
    host_case("walker_walk", 250, action_repeat=4),
    host_case("finger_turn_easy"),
    host_case("reacher_hard"),
    host_case("fish_swim", 200, action_repeat=5),
    host_case("lqr_2_1", None),
    gym_case("HalfCheetah-v5", 500, action_repeat=2),
    gym_case("Pendulum-v1", 200),
]
JAX_NAMES = [*envs.REGISTRY, "gymnax:Pendulum-v1"]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("brax:reacher:positional",)]
"""Physics that takes half a minute to compile in all the ways that the checks of JAX environments ask for."""
OPTIONAL = {"memory_chain": "gymnax", "gymnax": "gymnax", "brax": "brax", "mjx": "mujoco.mjx"}
"""Environments, or libraries of them, that need a package which is not installed by default."""


@pytest.fixture(autouse=True)
def _has_what_it_needs(request):
    """Skips an environment whose optional package is missing."""
    case = request.getfixturevalue("case") if "case" in request.fixturenames else None
    name = case.name if case else request.node.callspec.params["name"]
    if package := OPTIONAL.get(name.partition(":")[0]):
        pytest.importorskip(package)


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request) -> Case:
    return request.param


@pytest.fixture
def make(case):
    """make(seed) opens an environment of the case, and closes it after the test."""
    opened = []

    def open_one(seed: int):
        opened.append(case.open(seed))
        return opened[-1]

    yield open_one
    for env in opened:
        env.close()


@pytest.mark.parametrize("name", checks.CHECKS)
def test_check(case, make, name):
    if name == "starts differ" and not case.random:
        pytest.skip("nothing is drawn")
    checks.CHECKS[name](make)


def test_episode_ends_when_and_how_the_case_says(case, make):
    env = make(0)
    assert env.spec.max_steps == case.length
    if case.length is None:
        pytest.skip("episodes without a fixed end")
    for episode in range(1 if case.length > 10 else 3):
        env.reset()
        for t, action in enumerate(checks.actions(env.spec, case.length, episode), start=1):
            timestep = env.step(action)
            assert bool(timestep.is_last) == (t == case.length)
            assert bool(timestep.is_terminal) == (t == case.length and case.end == "terminal")


def test_state_survives_a_file(make, tmp_path):
    """Through npz without pickling, as checkpoints keep it."""
    env, other = make(5), make(6)
    checks.play(env, 7)
    np.savez(tmp_path / "state.npz", **env.get_state())
    with np.load(tmp_path / "state.npz", allow_pickle=False) as state:
        other.set_state(dict(state))
    assert all(map(checks.same, checks.play(env, 3), checks.play(other, 3)))


@pytest.mark.parametrize("name", JAX_NAMES)
def test_jax_registry_has_a_case(name):
    assert name in {case.name for case in CASES}
    assert envs.make_jax(name).spec.name == name


@pytest.mark.parametrize("check", checks.JAX_CHECKS)
@pytest.mark.parametrize("name", [*JAX_NAMES, *SLOW])
def test_jax_check(name, check):
    checks.JAX_CHECKS[check](jax_env(name))
