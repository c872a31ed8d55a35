"""The gymnasium adapter, and the check of an environment of one's own."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
from pathlib import Path

import gymnasium
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces

from mbrl import envs
from mbrl.envs import checks
from mbrl.envs.gym import Gymnasium
from mbrl.envs.pool import HostPool
from mbrl.errors import UserError
from mbrl.types import ArraySpec, TimeStep
from tests.helpers import rng_words, set_rng

ROOT = Path(__file__).parents[2]


class Spaces(gymnasium.Env):
    """Shows samples of its observation space and remembers what it was told to do."""

    def __init__(self, observation, action, end=(False, False)):
        self.observation_space, self.action_space = copy.deepcopy(observation), action
        self.end = end
        self.done = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.done.append(action)
        return self.observation_space.sample(), 0.5, *self.end, {}


BOX = spaces.Box(-1, 1, (2,))
EVERYTHING = spaces.Dict(
    {
        "image": spaces.Box(0, 255, (4, 4, 3), np.uint8),
        "ram": spaces.Box(0, 255, (3,), np.uint8),
        "scalar": spaces.Box(-1, 1, ()),
        "wide": spaces.Box(-np.inf, np.inf, (2, 2), np.float64),
        "inner": spaces.Dict({"b": spaces.Discrete(3, start=5), "a": spaces.MultiBinary(2)}),
        "pair": spaces.Tuple([spaces.MultiDiscrete([2, 4]), BOX]),
    }
)


def test_every_kind_of_observation():
    env = Gymnasium(Spaces(EVERYTHING, BOX), 0)
    assert env.spec.obs == {
        "image": ArraySpec((4, 4, 3), "uint8"),
        "inner/a": ArraySpec((2,)),
        "inner/b": ArraySpec((), "int32", 3),
        "pair/0": ArraySpec((2,), "int32", 4),
        "pair/1": ArraySpec((2,)),
        "ram": ArraySpec((3,)),
        "scalar": ArraySpec((1,)),
        "wide": ArraySpec((2, 2)),
    }
    for check in (checks.check_spec, checks.check_data, checks.check_kept, checks.check_state):
        check(lambda seed: Gymnasium(Spaces(EVERYTHING, BOX), seed))


def test_values_are_those_of_gymnasium():
    inner = Spaces(spaces.Dict({"x": spaces.Discrete(3, start=5), "y": BOX}), BOX)
    env = Gymnasium(inner, 0)
    env.reset()
    inner.observation_space.seed(7)
    shown = env.step(np.zeros(2, np.float32)).obs
    inner.observation_space.seed(7)
    theirs = inner.observation_space.sample()
    assert shown["x"] == theirs["x"] - 5
    np.testing.assert_array_equal(shown["y"], theirs["y"])


def test_actions_reach_the_environment_in_its_own_units():
    box = spaces.Box(
        np.array([[-2.0, 0.0], [1.0, -np.inf]]), np.array([[2.0, 10.0], [3.0, np.inf]]), dtype=np.float64
    )
    inner = Spaces(BOX, box)
    env = Gymnasium(inner, 0)
    env.reset()
    for action in ([-1, -1, -1, -1], [1, 1, 1, 1], [0, 0.5, 0, 9]):
        env.step(np.array(action, np.float32))
    np.testing.assert_allclose(inner.done[0], [[-2, 0], [1, -1]])
    np.testing.assert_allclose(inner.done[1], [[2, 10], [3, 1]])
    np.testing.assert_allclose(inner.done[2], [[0, 7.5], [2, 1]])
    inner = Spaces(BOX, spaces.Discrete(3, start=-1))
    env = Gymnasium(inner, 0)
    assert env.spec.action == ArraySpec((3,), classes=3)
    env.reset()
    for i in range(3):
        env.step(np.eye(3, dtype=np.float32)[i])
    assert inner.done == [-1, 0, 1]


@pytest.mark.parametrize("end", [(False, False), (True, False), (False, True), (True, True)])
def test_ends_and_action_repeat(end):
    """Rewards are summed until the episode ends; a time limit is not terminal, and then no step follows."""
    env = Gymnasium(Spaces(BOX, BOX, end), 0, action_repeat=3)
    env.reset()
    timestep = env.step(np.zeros(2, np.float32))
    assert timestep.reward == (0.5 if any(end) else 1.5)
    assert (timestep.is_last, timestep.is_terminal) == (any(end), end[0])
    if any(end):
        with pytest.raises(RuntimeError, match="call reset"):
            env.step(np.zeros(2, np.float32))
    with pytest.raises(ValueError, match=r"\(2,\) expected"):
        env.reset(), env.step(np.zeros(3, np.float32))


@pytest.mark.parametrize(
    ("observation", "action", "words"),
    [
        (spaces.Text(3), BOX, ["Text", "Box, Discrete"]),
        (spaces.Dict({"a": spaces.Dict({"b": spaces.Text(3)})}), BOX, ["'a/b'", "Text"]),
        (BOX, spaces.MultiBinary(2), ["action space", "MultiBinary", "Discrete or a Box"]),
        (BOX, spaces.Box(0, 9, (2,), np.int64), ["action space", "Box of int64"]),
    ],
)
def test_spaces_that_nothing_here_can_use(observation, action, words):
    with pytest.raises(ValueError) as error:
        Gymnasium(Spaces(observation, action), 0)
    assert all(word in str(error.value) for word in words), error.value


def test_a_task_of_the_registry(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env = envs.make_host("gym:HalfCheetah-v5", 3, 2)
    assert (env.spec.name, env.spec.max_steps, env.spec.action.shape) == ("gym:HalfCheetah-v5", 500, (6,))
    theirs = gymnasium.make("HalfCheetah-v5")
    seed = np.random.SeedSequence([3, 0]).generate_state(1)[0]
    np.testing.assert_array_equal(env.reset().obs["state"], np.float32(theirs.reset(seed=int(seed))[0]))
    action = np.full(6, 0.5, np.float32)
    reward = sum(theirs.step(action)[1] for _ in range(2))
    assert env.step(action).reward == pytest.approx(reward, rel=1e-6)
    env.close(), theirs.close()


def test_making_one_is_quiet(tmp_path, monkeypatch, capfd):
    """MuJoCo would print a note on gymnasium's model and write a file into the current folder."""
    monkeypatch.chdir(tmp_path)
    envs.make_host("gym:HalfCheetah-v5", 0, 1).close()
    assert "".join(capfd.readouterr()) == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["HalfCheeta-v5", "HalfCheetah", "ALE/Pong-v5", "nothing"])
def test_unknown_tasks_are_one_sentence(name):
    with pytest.raises(ValueError) as error:
        envs.make_host(f"gym:{name}", 0, 1)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_without_gymnasium_the_extra_is_named():
    code = (
        "import sys; sys.modules['gymnasium'] = None\nfrom mbrl import envs\n"
        "try: envs.make_host('gym:CartPole-v1', 0, 1)\nexcept ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pip install 'mbrl-jax[gym]'" in done.stdout


def test_a_picture_is_asked_for_in_any_size(monkeypatch):
    env = envs.make_host("gym:Pendulum-v1", 0, 1)
    env.reset()
    picture = np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)
    monkeypatch.setattr(env._env, "render", lambda: picture)
    np.testing.assert_array_equal(env.render(20, 30), picture[::2, ::2])
    assert env.render(80, 80).shape == (80, 80, 3)
    monkeypatch.setattr(env._env, "render", lambda: None)
    with pytest.raises(RuntimeError, match="no pictures"):
        env.render(20, 30)


def test_a_pool_restarts_where_it_was():
    pool = HostPool([envs.make_host("gym:Pendulum-v1", seed, 1) for seed in (1, 2)])
    start = pool.get_state()
    first = pool.reset()
    again = HostPool([envs.make_host("gym:Pendulum-v1", seed, 1) for seed in (8, 9)])
    again.set_state(start)
    np.testing.assert_array_equal(again.reset().obs["state"], first.obs["state"])


# Environments of one's own


@pytest.mark.parametrize("name", ["own_jax_environment", "own_gymnasium_environment"])
def test_examples_pass_their_check(name):
    """Short enough to be read in a minute; and the registry finds them by their import path."""
    path = ROOT / "examples" / f"{name}.py"
    assert len(path.read_text().splitlines()) <= 50
    done = subprocess.run([sys.executable, path], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "FAILED" not in done.stdout and "ok      reset" in done.stdout, done


def test_own_environments_by_import_path():
    assert envs.is_jax("examples.own_jax_environment:make")
    assert envs.make_jax("examples.own_jax_environment:make", max_steps=9).spec.max_steps == 9
    assert not envs.is_jax("examples.own_gymnasium_environment:make")
    assert envs.make_host("examples.own_gymnasium_environment:make", 0, 2).spec.action_repeat == 2
    for name in ("examples.nothing:make", "examples.own_jax_environment:nothing"):
        with pytest.raises(ValueError, match="cannot be imported"):
            envs.is_jax(name)


class Bad:
    """An environment on the host that does one thing wrong."""

    def __init__(self, fault: str, seed: int):
        self.fault = fault
        self.spec = envs.make_host("gym:Pendulum-v1", 0, 1).spec
        self.rng = np.random.default_rng() if fault == "same seed, same data" else np.random.default_rng(seed)
        self.rng = np.random.default_rng(0) if fault == "starts differ" else self.rng
        self.t, self.x, self.buffer = 0, np.zeros(3, np.float32), np.zeros(3, np.float32)
        if fault == "spec":
            self.spec = self.spec.__class__("bad", self.spec.obs, ArraySpec((2, 2)))

    def show(self, reward=0.0, last=False, terminal=False):
        x = self.x.astype(np.float64) if self.fault == "data match the spec" else self.x.copy()
        if self.fault == "observations may be kept":
            self.buffer[:] = x
            x = self.buffer
        return TimeStep({"state": x}, np.float32(reward), last, terminal)

    def reset(self):
        self.t, self.x = 0, self.rng.normal(size=3).astype(np.float32)
        return self.show(reward=float(self.fault == "reset"))

    def step(self, action):
        action = action if self.fault == "actions are clipped" else np.clip(action, -1, 1)
        self.t, self.x = self.t + 1, (self.x + 0.1 * action).astype(np.float32)
        return self.show(1.0, self.t >= 200 and self.fault != "end of an episode")

    def get_state(self):
        keep = {} if self.fault == "state can be saved" else {"x": self.x.copy()}
        return {"t": np.array(self.t), "rng": rng_words(self.rng), **keep}

    def set_state(self, state):
        self.t, self.x = int(state["t"]), state.get("x", np.zeros(3, np.float32)).copy()
        set_rng(self.rng, state["rng"])

    def render(self, height, width):
        raise RuntimeError("no pictures")

    def close(self): ...


@pytest.mark.parametrize("fault", ["", *checks.CHECKS])
def test_each_fault_is_found_and_explained(fault):
    said = []
    good = checks.check(lambda seed: Bad(fault, seed), say=said.append)
    assert good == (fault == "")
    failures = {line[8:].split(":")[0]: line for line in said if line.startswith("FAILED")}
    assert (fault in failures) == (fault != "")
    others = {"starts differ": {"same seed, same data"}, "spec": set(checks.CHECKS)}
    if fault == "same seed, same data":
        assert "generator made from the seed" in failures[fault]
    elif fault and fault not in others:
        assert set(failures) == {fault}, failures


def test_faults_of_an_environment_in_jax():
    made = importlib.import_module("examples.own_jax_environment").make()
    said = []

    def whole(key):
        state, timestep = made.reset(key)
        return state._replace(position=jnp.int32(0)), timestep

    assert not checks.check(made._replace(reset=whole), say=said.append)
    expected = "state.position is int32 () after reset and float32 () after step"
    assert any(expected in line for line in said), said

    def greedy(key):
        state, timestep = made.reset(key)
        return state._replace(velocity=jnp.float32(0) * made.reset(key)[0].position), timestep

    said = []
    assert not checks.check(made._replace(reset=greedy), say=said.append)
    assert any("key is used twice" in line for line in said), said


def test_a_single_environment_is_not_enough():
    with pytest.raises(UserError, match="lambda seed"):
        checks.check(Bad("", 0))


def test_only_what_can_be_checked_is_said(capsys):
    assert not envs.check(lambda seed: 1 / 0)
    assert capsys.readouterr().out.count("ZeroDivisionError") == len(checks.CHECKS)
